"""A microbatch as one row without padding: the samples one after the other, none seeing another.

Input: the padded microbatch of any collator. Output: the same tensors with every text key of shape `(rows, length)`
joined into `(1, tokens)`, and what keeps the samples apart: position ids that restart with every sample, from which
transformers builds block-diagonal masks (SDPA, eager, flex attention) and cumulative lengths (FlashAttention). Where a
model has a mask rule of its own (bidirectional images, prefixes), the mask is given ready made.

Images and sounds stay as the padding collator gave them: features are put into the row in their order, and joining
rows keeps that order.

Assumptions: the padded microbatch marks its tokens in a 2-D `attention_mask`; a sample attends to itself alone.
`check_packing` tries on the model itself whether that is all it takes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_dflop.data.collate import VisionLanguageCollator
from hf_dflop.data.structure import ModelStructure
from hf_dflop.errors import DatasetError
from hf_dflop.rows.encode import IGNORE
from hf_dflop.rows.render import audio_extractor

__all__ = ["PackedCollator"]


class PackedCollator:
    """Data collator that joins the samples of a microbatch into one row; pass it to `Trainer` as `data_collator`.

    The label of the first token of every sample is ignored, so that no sample predicts the first token of the next,
    and `Trainer`'s count of label tokens stays the one of the padded microbatch.

    For training only: an evaluation of `Trainer` gathers predictions row by row, and takes rows for samples when it
    drops those that fill the last batch. [`DflopCallback`] lets evaluations use the padding collator, kept in the
    attribute `collator`; without the callback, evaluate with that one.

    Args:
        processor_or_collator (`ProcessorMixin` or `Callable`):
            The model's processor, or a collator that pads and returns an `attention_mask` (a
            [`VisionLanguageCollator`], TRL's, your own).
        model (`PreTrainedModel` or `PreTrainedConfig`):
            The model that is trained, or its config. Only its class and config are read, and nothing of its weights is
            kept: they tell how positions count (several dimensions in Qwen-VL) and what a token may attend to.
        settings:
            Arguments of [`VisionLanguageCollator`] when a processor is given: `labels`, `max_length`, ...

    Example:
        >>> collate = PackedCollator(processor, model)                                  # doctest: +SKIP
        >>> batch = collate([dataset[0], dataset[1]])                                   # doctest: +SKIP
        >>> batch["input_ids"].shape, batch["position_ids"][0, :3]                      # doctest: +SKIP
        (torch.Size([1, 612]), tensor([0, 1, 2]))
    """

    def __init__(self, processor_or_collator: Any, model: Any, **settings: Any) -> None:
        is_processor = hasattr(processor_or_collator, "tokenizer") and (
            hasattr(processor_or_collator, "image_processor") or audio_extractor(processor_or_collator) is not None
        )
        if settings and not is_processor:
            raise ValueError(f"{sorted(settings)} are for a processor; give them to your own collator instead")
        self.collator = (
            VisionLanguageCollator(processor_or_collator, **settings) if is_processor else processor_or_collator
        )
        self.structure = ModelStructure.of(model)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a microbatch of one row.

        Raises:
            DatasetError: the padding collator gives no 2-D `attention_mask`, so its padding cannot be told; or there
                are sounds, and the model's positions have several dimensions.
        """
        return self.pack(self.collator(rows))

    def pack(self, padded: Mapping[str, Any]) -> dict[str, Any]:
        """Join the rows of a padded microbatch.

        Args:
            padded (`Mapping`): `input_ids` and `attention_mask` of shape `(rows, length)`, and the model's other keys.

        Returns:
            `dict[str, Any]`: text keys of shape `(1, tokens)`; `position_ids` `(1, tokens)`, or `(1 + k, 1, tokens)`
            for positions of k dimensions (first the position in the sample); `use_cache`, because a cache turns the
            detection of joined samples off; `attention_mask` only where the model has a mask rule of its own.
        """
        import torch

        mask = padded.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.shape != padded["input_ids"].shape or mask.ndim != 2:
            raise DatasetError(
                "the padding collator gives no attention_mask of the shape of input_ids, so tokens cannot be told "
                "from padding; return the tokenizer's attention_mask from it"
            )
        kept = mask.bool()
        text = {key: value for key, value in padded.items() if _is_text(key, value, mask) and key != "attention_mask"}
        starts = kept & (kept.cumsum(dim=1) == 1)
        packed: dict[str, Any] = {key: value for key, value in padded.items() if key not in (*text, "attention_mask")}
        for key, value in text.items():
            packed[key] = value[kept][None]
        if "labels" in packed:
            packed["labels"] = packed["labels"].masked_fill(starts[kept][None], IGNORE)
        packed["position_ids"] = self._positions({**padded, "attention_mask": mask}, kept)
        packed["use_cache"] = False
        own_mask = self.structure.attention_mask(
            [{key: text[key][i][kept[i]] for key in text} for i in range(len(kept))]
        )
        if own_mask is not None:
            packed["attention_mask"] = own_mask
        return packed

    def _positions(self, padded: Mapping[str, Any], kept: Any) -> Any:
        import torch

        within = (kept.long().cumsum(dim=1) - 1)[kept][None]
        if "input_features" in padded and self.structure.has_grid:
            raise DatasetError(
                f"{self.structure.model_class.__name__} has positions of several dimensions, and those of sounds are "
                "not known here: samples with sounds are not packed; use a padding collator"
            )
        grid = self.structure.grid_positions(padded)
        return within if grid is None else torch.cat([within[None], grid[:, kept][:, None]])


def _is_text(key: str, value: Any, mask: Any) -> bool:
    """Whether a value has one number per token; a mask of a sound's frames may have the same shape by chance."""
    if "feature" in key or "audio" in key:
        return False
    return getattr(value, "shape", None) == mask.shape and not value.is_floating_point()
