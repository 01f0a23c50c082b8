"""Tiny models run on a mixed microbatch as the collator makes it: text only, one image, several images."""

from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
)

from hf_dflop.data import VisionLanguageCollator
from tests.unit.rows import tiny

VOCABULARY = 600
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**VISION, "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}


def siglip(side: int, patch: int) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **VISION, "image_size": side, "patch_size": patch}


def build(processor: Any) -> Any:
    token = processor.tokenizer.convert_tokens_to_ids
    name = type(processor).__name__
    if name == "LlavaProcessor":
        clip = {"model_type": "clip_vision_model", **VISION, "image_size": 56, "patch_size": 14}
        text = {"model_type": "llama", **TEXT}
        return LlavaConfig(
            vision_config=clip, text_config=text, image_token_index=token("<image>"), vision_feature_layer=-1
        )
    if name == "LlavaOnevisionProcessor":
        return LlavaOnevisionConfig(
            vision_config=siglip(54, 18),
            text_config={"model_type": "qwen2", **TEXT},
            image_token_index=token("<image>"),
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        )
    if name == "Idefics3Processor":
        return Idefics3Config(
            vision_config={**VISION, "image_size": 56, "patch_size": 14},
            text_config={"model_type": "llama", **TEXT},
            image_token_id=token("<image>"),
            scale_factor=2,
        )
    if name == "Gemma3Processor":
        return Gemma3Config(
            vision_config=siglip(56, 14),
            text_config={**TEXT, "head_dim": 8},
            mm_tokens_per_image=4,
            image_token_index=token("<image_soft_token>"),
        )
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLConfig(
        vision_config={**vision, "patch_size": 14, "fullatt_block_indexes": [0]},
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        image_token_id=token("<|image_pad|>"),
    )


def row(question: str, *sizes: tuple[int, int]) -> dict[str, Any]:
    images = []
    for width, height in sizes:
        file = BytesIO()
        Image.effect_noise((width, height), 50).convert("RGB").save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    turns = [
        {"role": "user", "content": "<image>" * len(images) + question},
        {"role": "assistant", "content": "the sea"},
    ]
    return {"messages": turns, "images": images}


@pytest.mark.parametrize(
    "processor",
    [tiny.llava, tiny.llava_onevision, tiny.idefics3, tiny.gemma3, tiny.qwen2_5_vl],
    ids=lambda b: b.__name__,
)
def test_the_loss_of_a_mixed_batch_is_that_of_its_rows(processor: Any) -> None:
    torch.manual_seed(0)
    collate = VisionLanguageCollator(processor())
    model = AutoModelForImageTextToText.from_config(build(collate.processor)).train()
    rows = [row("what?", (150, 40)), row("no picture here"), row("both?", (30, 90), (60, 60))]
    together = model(**collate(rows)).loss
    alone = [
        (model(**batch).loss, int((batch["labels"][:, 1:] != -100).sum()))
        for batch in map(collate, [[r] for r in rows])
    ]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    together.backward()
