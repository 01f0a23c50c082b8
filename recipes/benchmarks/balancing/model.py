"""The model that the balancing topic trains: the demo's architecture, tokenizer and image processor, made narrow.

The demo's own model is too wide for fourteen arms on two cores, so this one has a third of its widths and random
weights: seconds depend on shapes alone. Packed rows attend sample by sample, as varlen kernels do on GPUs; stock SDPA
would compute all pairs of the joined row.

In: the demo's cache. Out: model and processor.
"""

from pathlib import Path
from typing import Any

import torch

__all__ = ["ATTENTION", "SIZES", "build_bench_model"]

ATTENTION = "sdpa_by_sample"
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
    _register()
    model.model.language_model.config._attn_implementation = ATTENTION
    return model, processor


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; a row whose positions restart is cut there, and each sample attends alone."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    positions = kwargs.get("position_ids")
    starts = [0]
    if query.shape[0] == 1 and positions is not None and positions.shape[-1] == query.shape[2]:
        starts = (positions.reshape(-1) == 0).nonzero().flatten().tolist() or [0]
    if len(starts) == 1:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    ends = [*starts[1:], query.shape[2]]
    parts = [
        sdpa_attention_forward(module, query[:, :, b:e], key[:, :, b:e], value[:, :, b:e], None, **kwargs)[0]
        for b, e in zip(starts, ends, strict=True)
    ]
    return torch.cat(parts, dim=1), None
