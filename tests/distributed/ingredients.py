"""Models, annotated rows and collators for tests with a Trainer or a loop: made once, for all ranks and runs."""

import copy
import functools
from typing import Any

import torch

import hf_dflop
from tests.distributed import chats, pipelines
from tests.distributed.every_case import EVERY_CASE

LAYERS = {"llava": 2, "lora": 2, "qwen2_5_vl": 3, **({"qwen3_vl_moe": 3} if EVERY_CASE else {})}
"""Of the LLM of each family; "lora" is LLaVA with adapters, "qwen3_vl_moe" has the balancing loss of its routers."""


def ingredients(dtype: torch.dtype, family: str = "llava", *, dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """A fresh model, annotated rows (27: an epoch is four steps, and the last is short), collator."""
    built, rows, collator = _made(dtype, "llava" if family == "lora" else family)
    built = copy.deepcopy(built)
    if not family.startswith("qwen"):
        for module in built.model.language_model.layers:
            module.self_attn.attention_dropout = dropout
    if family == "lora":
        built = pipelines.with_lora(built, target_modules=r".*(q_proj|down_proj|fc1)", modules_to_save=["lm_head"])
    return built, rows, collator


@functools.cache
def _made(dtype: torch.dtype, family: str) -> tuple[Any, Any, Any]:
    rows, collator = _rows(family)
    if family == "llava":
        return chats.model(collator.processor).to(dtype), rows, collator
    built = pipelines.model(family, dtype, layers=LAYERS[family])
    if family.endswith("moe") and pipelines.takes_routers(built):
        built = pipelines.model(family, dtype, layers=LAYERS[family], balance=0.5)
    return built, rows, collator


@functools.cache
def _rows(family: str) -> tuple[Any, Any]:
    if family == "llava":
        processor = chats.chat_processor()
        config = chats.model(processor).config
    else:
        processor = pipelines.collator(family).processor
        config = pipelines.model(family, torch.float32, layers=LAYERS[family]).config
    rows, _ = hf_dflop.profile_dataset(chats.conversations(27, with_images=0.7), processor, config=config)
    return rows, hf_dflop.VisionLanguageCollator(processor)
