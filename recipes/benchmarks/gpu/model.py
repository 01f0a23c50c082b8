"""Model, samples and microbatches, all from shapes: nothing is downloaded, decoded or tokenised.

In: settings. Out: a two-module model with random weights, built on the device; an epoch of a mix as counts; any group
of its samples as tensors on the device, padded or packed.

Assumptions: seconds depend on shapes alone. Every tile gives the same number of LLM tokens, whatever the mix's model
gave; an image's tokens come before the text; the last tokens of the text are labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_dflop.data import PackedCollator, attend_by_sample
from hf_dflop.data.by_sample import BY_SAMPLE
from hf_dflop.rows.encode import IGNORE
from hf_dflop.shapes import Shapes
from recipes.benchmarks.common.mixes import draw_mix
from recipes.benchmarks.gpu.settings import GpuSettings

__all__ = ["MicrobatchMaker", "build_model", "model_config", "patches_per_tile", "replay_shapes", "tokens_per_tile"]

_WIDTHS: dict[bool, dict[str, dict[str, int]]] = {
    False: {
        "vision": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 16,
            "image_size": 512,
        },
        "llm": {
            "hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28, "num_key_value_heads": 4,
        },
    },
    True: {
        "vision": {
            "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 4, "image_size": 16,
        },
        "llm": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    },
}  # fmt: skip
"""By `is_tiny`: the fields of the published configs of SigLIP2 so400m and Qwen2.5-7B, and narrow ones."""
_MERGE = 2
"""Patches a side that the connector makes one LLM token of."""


def patches_per_tile(settings: GpuSettings) -> int:
    """Encoder positions of a tile."""
    vision = _WIDTHS[settings.is_tiny]["vision"]
    return (vision["image_size"] // vision["patch_size"]) ** 2


def tokens_per_tile(settings: GpuSettings) -> int:
    """LLM positions of a tile."""
    return patches_per_tile(settings) // _MERGE**2


def model_config(settings: GpuSettings) -> Any:
    """SigLIP tower, pixel shuffle and two matrices, Qwen2 LLM."""
    from transformers import AyaVisionConfig, Qwen2Config, SiglipVisionConfig

    widths = _WIDTHS[settings.is_tiny]
    return AyaVisionConfig(
        vision_config=SiglipVisionConfig(
            num_hidden_layers=settings.vision_layers, vision_use_head=False, **widths["vision"]
        ),
        text_config=Qwen2Config(
            num_hidden_layers=settings.llm_layers,
            vocab_size=settings.vocab_size,
            max_position_embeddings=131_072,
            use_cache=False,
            **widths["llm"],
        ),
        image_token_index=settings.vocab_size - 1,
        downsample_factor=_MERGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def build_model(settings: GpuSettings) -> Any:
    """The model with random weights, on the device, in training mode."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        model = AutoModelForImageTextToText.from_config(
            model_config(settings), dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
        )
    if settings.attention == BY_SAMPLE:
        assert attend_by_sample(model)
    return model.train()


def replay_shapes(mix: str, settings: GpuSettings, round_: int) -> Shapes:
    """The samples of a round of a mix: its tiles (up to the cap) and text, in this model's patches and tokens."""
    size = settings.num_ranks * settings.num_slots * settings.batch_sizes[mix]
    samples = draw_mix(mix, size * settings.num_steps, settings.seed + 1000 * round_)
    tiles = np.minimum(samples.tiles, settings.max_tiles[mix])
    return shapes_of(settings, tiles, samples.text_tokens, np.minimum(samples.num_images, tiles))


def shapes_of(settings: GpuSettings, tiles: Any, text_tokens: Any, num_images: Any) -> Shapes:
    """Counts of samples with so many tiles and text tokens, half of which are labels."""
    tiles = np.asarray(tiles)
    patches = patches_per_tile(settings)
    return Shapes(
        num_images=num_images,
        image_tiles=tiles,
        image_patches=tiles * patches,
        image_patches_sq=tiles * patches**2,
        image_tokens=tiles * tokens_per_tile(settings),
        text_tokens=text_tokens,
        label_tokens=np.asarray(text_tokens) // 2,
    )


class MicrobatchMaker:
    """Groups of samples → the model's inputs on the device.

    Args:
        model (`PreTrainedModel`): where the inputs go.
        settings ([`GpuSettings`]): seeds and sizes.
    """

    def __init__(self, model: Any, settings: GpuSettings) -> None:
        self._settings = settings
        self._device = torch.device(settings.device)
        self._dtype = getattr(torch, settings.dtype)
        self._packer = PackedCollator(self._padded, model)
        self._image_token = int(model.config.image_token_id)
        self._rng = torch.Generator().manual_seed(settings.seed)
        self._tiles = self._random_tiles(1)

    def __call__(self, shapes: Shapes, group: Sequence[int], *, packed: bool) -> dict[str, Any]:
        """The inputs of one microbatch; its tiles are the first of a pool, alike in every microbatch."""
        picked = shapes.select(group)
        rows: list[Any] = [tuple(map(int, counts)) for counts in zip(*self._counts(picked), strict=True)]
        batch: dict[str, Any] = self._packer(rows) if packed else self._padded(rows)
        batch = {key: self._to(value) for key, value in batch.items()}
        if num_tiles := int(picked.image_tiles.sum()):
            if num_tiles > len(self._tiles):
                self._tiles = self._random_tiles(num_tiles)
            batch["pixel_values"] = self._tiles[:num_tiles]
        return batch

    @staticmethod
    def _counts(shapes: Shapes) -> tuple[Any, Any, Any]:
        return shapes.image_tokens, shapes.text_tokens, shapes.label_tokens

    def _padded(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Text inputs `(rows, longest)` of samples of (image tokens, text tokens, label tokens), on the host."""
        longest = max(image + text for image, text, _ in rows)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORE)
        for row, (image, text, num_labels) in enumerate(rows):
            end = image + text
            ids[row, :image] = self._image_token
            ids[row, image:end] = torch.randint(1, self._image_token, (text,), generator=self._rng)
            mask[row, :end] = 1
            labels[row, end - num_labels : end] = ids[row, end - num_labels : end]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _random_tiles(self, count: int) -> torch.Tensor:
        side = _WIDTHS[self._settings.is_tiny]["vision"]["image_size"]
        generator = torch.Generator(self._device).manual_seed(self._settings.seed)
        return torch.randn((count, 3, side, side), device=self._device, dtype=self._dtype, generator=generator)

    def _to(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value
