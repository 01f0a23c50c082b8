"""A tiny model of each family, built to fit the tiny processors, and rows for it."""

from typing import Any

import torch
import transformers as tf

from tests.unit.data.test_models_take_it import TEXT, VISION, build, row, siglip
from tests.unit.rows import tiny

MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def config_of(name: str, processor: Any) -> Any:
    token = processor.tokenizer.convert_tokens_to_ids
    if name == "qwen2_vl":
        return tf.Qwen2VLConfig(
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14},
            text_config={**TEXT, "rope_parameters": MROPE},
            image_token_id=token("<|image_pad|>"),
        )
    if name == "qwen3_vl":
        vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
        return tf.Qwen3VLConfig(
            vision_config={**vision, "patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
            text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE},
            image_token_id=token("<|image_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
        )
    if name == "internvl":
        return tf.InternVLConfig(
            vision_config=tf.InternVLVisionConfig(**VISION, image_size=[56, 56], patch_size=[14, 14]),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=token("<IMG_CONTEXT>"),
        )
    if name == "smolvlm":
        return tf.SmolVLMConfig(
            vision_config={**VISION, "image_size": 56, "patch_size": 14},
            text_config={"model_type": "llama", **TEXT},
            image_token_id=token("<image>"),
            scale_factor=2,
        )
    if name == "paligemma":
        return tf.PaliGemmaConfig(
            vision_config=siglip(56, 14),
            text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
            image_token_id=token("<image>"),
            projection_dim=16,
            hidden_size=16,
        )
    if name == "mistral3":
        return tf.Mistral3Config(
            vision_config=tf.PixtralVisionConfig(**VISION, image_size=160, patch_size=16),
            text_config=tf.MistralConfig(**TEXT, head_dim=8),
            image_token_id=token("[IMG]"),
        )
    if name == "aya_vision":
        sizes = {key: value for key, value in VISION.items() if key != "intermediate_size"}
        return tf.AyaVisionConfig(
            vision_config=tf.Dinov2Config(**sizes, mlp_ratio=2, image_size=56, patch_size=14),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_id=token("<|IMG_PATCH|>"),
            vision_feature_select_strategy="default",  # drops the class token
            vision_feature_layer=-1,
        )
    if name == "gemma3":
        config = build(processor)
        config.text_config.sliding_window = 8  # shorter than the rows, so that windows matter
        return config
    return build(processor)


def model_of(name: str, processor: Any, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = config_of(name, processor)
    model = tf.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():  # a random tiny model hardly looks around itself: make attention sharp
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.3)
    return model.train()


def rows_of(name: str) -> list[dict[str, Any]]:
    if name == "paligemma":
        texts = [("what is it", "the sea"), ("and", "a photo of a cat"), ("why is it so", "so")]
        return [
            {"question": q, "answer": a, "image": row("", (60, 40 + 10 * i))["images"][0]}
            for i, (q, a) in enumerate(texts)
        ]
    return [
        row("what?", (150, 40)),
        row("no picture here"),
        row("both?", (30, 90), (60, 60)),
        row("and this", (60, 60)),
    ]


FAMILIES = {
    build_processor.__name__: build_processor
    for build_processor in (
        *(tiny.llava, tiny.llava_onevision, tiny.qwen2_vl, tiny.qwen2_5_vl, tiny.qwen3_vl, tiny.internvl),
        *(tiny.idefics3, tiny.smolvlm, tiny.aya_vision, tiny.gemma3, tiny.paligemma, tiny.mistral3),
    )
}
