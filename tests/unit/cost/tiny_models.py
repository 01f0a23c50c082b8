"""Tiny vision-language models built from configs, with inputs and shapes written by hand (no processor)."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from hf_dflop.shapes import Shapes

TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 7,
}  # 8 x 8 = 64 patches
QWEN_VISION = {
    "depth": 4,
    "hidden_size": 48,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 7,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
HEAD = {"vision_use_head": True}  # the default of the model, which not every version of its config tells
IMAGE_ID = 290
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

Inputs = dict[str, Any]
Built = tuple[Any, Inputs, Shapes]


def shapes_of(tiles: list[int], image_tokens: int, text_tokens: int) -> Shapes:
    """Shapes of one sample whose encoder runs tiles of the given numbers of patches."""
    return Shapes(
        num_images=[1],
        image_tiles=[len(tiles)],
        image_patches=[sum(tiles)],
        image_patches_sq=[sum(n * n for n in tiles)],
        image_tokens=[image_tokens],
        text_tokens=[text_tokens],
        label_tokens=[text_tokens],
    )


def text_ids(image_tokens: int, text_tokens: int, image_id: int = IMAGE_ID) -> torch.Tensor:
    """One row: four text tokens, the image, the rest of the text."""
    ids = [5, 6, 7, 8] + [image_id] * image_tokens + [9] * (text_tokens - 4)
    return torch.tensor([ids])


def pixels(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def build(config: Any) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return tf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").train()


def llava_clip_llama() -> Built:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE_ID,
    )
    return (
        build(config),
        {"input_ids": text_ids(64, 30), "pixel_values": pixels(1, 3, 56, 56)},
        shapes_of([64], 64, 30),
    )


def llava_dinov2(**extra: Any) -> Built:
    sizes = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    vision = tf.Dinov2Config(**sizes, mlp_ratio=3, **extra)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return (
        build(config),
        {"input_ids": text_ids(65, 30), "pixel_values": pixels(1, 3, 56, 56)},
        shapes_of([64], 65, 30),
    )


def llava_dinov2_swiglu() -> Built:
    return llava_dinov2(use_swiglu_ffn=True)


def llava_siglip_phi() -> Built:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = tf.LlavaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.PhiConfig(**text),
        image_token_id=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return (
        build(config),
        {"input_ids": text_ids(64, 30), "pixel_values": pixels(1, 3, 56, 56)},
        shapes_of([64], 64, 30),
    )


def llava_onevision_siglip_qwen2() -> Built:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_ID,
        image_grid_pinpoints=[[56, 112], [112, 56]],
    )
    # two tiles and the overview; 56 x 112 image: 8 x 16 features + 8 newlines + 64 of the overview
    inputs = {
        "input_ids": text_ids(64 + 8 * 16 + 8, 30),
        "pixel_values": pixels(1, 3, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 112]]),
    }
    return build(config), inputs, shapes_of([64, 64, 64], 200, 30)


def qwen_inputs(grid: tuple[int, int, int], text_tokens: int) -> tuple[Inputs, Shapes]:
    frames, height, width = grid
    patches = frames * height * width
    ids = text_ids(patches // 4, text_tokens)
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels(patches, 3 * 2 * 7 * 7),
        "image_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == IMAGE_ID).long(),
    }
    return inputs, shapes_of([height * width] * frames, patches // 4, text_tokens)


def qwen(config_class: Any, vision: dict[str, Any], text: dict[str, Any] | None = None) -> Built:
    config = config_class(
        vision_config=QWEN_VISION | vision,
        text_config=TEXT | {"rope_parameters": MROPE} | (text or {}),
        image_token_id=IMAGE_ID,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
    )
    inputs, shapes = qwen_inputs((1, 16, 12), 30)
    return build(config), inputs, shapes


def qwen2_vl() -> Built:
    return qwen(tf.Qwen2VLConfig, {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 3})


def qwen2_5_vl() -> Built:
    windowed = {
        "out_hidden_size": 64,
        "intermediate_size": 100,
        "window_size": 28,
        "fullatt_block_indexes": [3],
    }
    return qwen(tf.Qwen2_5_VLConfig, windowed)


QWEN3_VISION = {
    "out_hidden_size": 64,
    "intermediate_size": 100,
    "deepstack_visual_indexes": [1, 2],
    "num_position_embeddings": 64,
}


def qwen3_vl() -> Built:
    return qwen(tf.Qwen3VLConfig, QWEN3_VISION, {"head_dim": 16})


def qwen3_vl_moe() -> Built:
    moe = {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    }
    return qwen(tf.Qwen3VLMoeConfig, QWEN3_VISION, moe)


def glm4v() -> Built:
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "num_heads": 4,
        "patch_size": 7,
        "image_size": 56,
        "out_hidden_size": 64,
        "intermediate_size": 100,
    }
    config = tf.Glm4vConfig(
        vision_config=vision,
        text_config=TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        image_token_id=IMAGE_ID,
        video_token_id=291,
        image_start_token_id=292,
        image_end_token_id=293,
    )
    inputs, shapes = qwen_inputs((1, 16, 12), 30)
    return build(config), inputs, shapes


def gemma3() -> Built:
    config = tf.Gemma3Config(
        vision_config=VISION | HEAD,
        text_config=TEXT | {"head_dim": 24, "sliding_window": 16},
        image_token_id=IMAGE_ID,
        mm_tokens_per_image=16,
    )
    ids = text_ids(16, 40)
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels(1, 3, 56, 56),
        "token_type_ids": (ids == IMAGE_ID).long(),
    }
    return build(config), inputs, shapes_of([64], 16, 40)


def paligemma() -> Built:
    config = tf.PaliGemmaConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model"} | HEAD,
        text_config=TEXT | {"model_type": "gemma", "head_dim": 24},
        image_token_id=IMAGE_ID,
        projection_dim=64,
        hidden_size=64,
    )
    ids = text_ids(64, 30)
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels(1, 3, 56, 56),
        "token_type_ids": torch.zeros_like(ids),
    }
    return build(config), inputs, shapes_of([64], 64, 30)


def internvl() -> Built:
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**(VISION | {"image_size": [56, 56], "patch_size": [7, 7]})),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_ID,
    )
    return (
        build(config),
        {"input_ids": text_ids(32, 30), "pixel_values": pixels(2, 3, 56, 56)},
        shapes_of([64, 64], 32, 30),
    )


def idefics3() -> Built:
    config = tf.Idefics3Config(
        vision_config=VISION, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE_ID, pad_token_id=0
    )
    inputs = {"input_ids": text_ids(32, 30), "pixel_values": pixels(1, 2, 3, 56, 56)}
    return build(config), inputs, shapes_of([64, 64], 32, 30)


def mistral3_pixtral() -> Built:
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT, head_dim=24),
        image_token_id=IMAGE_ID,
    )
    inputs = {
        "input_ids": text_ids(12, 30),
        "pixel_values": pixels(1, 3, 56, 42),
        "image_sizes": torch.tensor([[56, 42]]),
    }
    return build(config), inputs, shapes_of([48], 12, 30)


def aya_vision() -> Built:
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Cohere2Config(**TEXT),
        image_token_id=IMAGE_ID,
    )
    return (
        build(config),
        {"input_ids": text_ids(16, 30), "pixel_values": pixels(1, 3, 56, 56)},
        shapes_of([64], 16, 30),
    )


def ovis2() -> Built:
    config = tf.Ovis2Config(
        vision_config=VISION | {"vocab_size": 50, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_ID,
        visual_indicator_token_ids=[291, 292, 293, 294, 295],
        hidden_size=64,
        vocab_size=300,
    )
    return (
        build(config),
        {"input_ids": text_ids(16, 30), "pixel_values": pixels(1, 3, 56, 56)},
        shapes_of([64], 16, 30),
    )


MODELS: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        llava_clip_llama,
        llava_dinov2,
        llava_dinov2_swiglu,
        llava_siglip_phi,
        llava_onevision_siglip_qwen2,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        glm4v,
        gemma3,
        paligemma,
        internvl,
        idefics3,
        mistral3_pixtral,
        aya_vision,
        ovis2,
    )
}
