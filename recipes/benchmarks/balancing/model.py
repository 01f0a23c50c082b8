"""The model that the balancing topic trains: the demo's architecture, tokenizer and image processor, made narrow.

The demo's own model is too wide for fourteen arms on two cores, so this one has a third of its widths and random
weights: seconds depend on shapes alone. Packed rows attend sample by sample, as varlen kernels do on GPUs; stock SDPA
would compute all pairs of the joined row.

In: the demo's cache. Out: model and processor.
"""

from pathlib import Path
from typing import Any

import torch

from hf_dflop.data import attend_by_sample

__all__ = ["SIZES", "build_bench_model"]

SIZES: dict[str, int] = {
    "vision_width": 128,
    "vision_layers": 5,
    "llm_width": 192,
    "llm_layers": 2,
    "vocab_size": 2048,
}


def build_bench_model(cache: Path, max_tiles: int, seed: int = 0) -> tuple[Any, Any]:
    """The model in float32, and its processor with pictures of at most `max_tiles` tiles."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Dinov2Config, LlamaConfig

    from recipes.demo.fetch import fetch
    from recipes.demo.model import DemoModelConfig, build_processor

    config = DemoModelConfig(vocab_size=SIZES["vocab_size"], max_tiles=max_tiles)
    processor = build_processor(fetch(cache).llm_gguf, config)
    tokenizer = processor.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_config = AyaVisionConfig(
        vision_config=Dinov2Config(
            hidden_size=SIZES["vision_width"],
            num_hidden_layers=SIZES["vision_layers"],
            num_attention_heads=4,
            image_size=config.tile_pixels,
            patch_size=14,
            use_mask_token=False,
        ),
        text_config=LlamaConfig(
            hidden_size=SIZES["llm_width"],
            intermediate_size=4 * SIZES["llm_width"],
            num_hidden_layers=SIZES["llm_layers"],
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=len(tokenizer),
            max_position_embeddings=16_384,
            **ids,
        ),
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        downsample_factor=3,
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(seed)
    model = AyaVisionForConditionalGeneration(model_config).float()
    assert attend_by_sample(model)
    return model, processor
