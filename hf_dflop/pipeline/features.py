"""Features of images or videos as the model's own code gives and takes them ↔ the flat rows that are sent.

In: what `get_image_features` or `get_video_features` returns. Out: one tensor `(rows, width)`; features of several
depths (deepstack) stand side by side in a row. The format is read once from a real output and told to all ranks as
plain JSON.

Assumptions: rows are in the order of the image (video) tokens; everything else the encoder returns is not used by the
LLM.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_dflop.errors import ModelError

__all__ = ["FeatureFormat", "flatten", "read_format", "unflatten"]

_NOT_SENT = ("last_hidden_state", "hidden_states", "attentions", "pooler_output")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFormat:
    """How a family hands features over."""

    width: int
    """Numbers in a row of `pooler_output`."""
    trailing: tuple[int, ...] | None
    """Shape of an item after its first dimension where `pooler_output` is a tensor; `None` where it is a list."""
    extras: tuple[tuple[str, int, bool], ...] = ()
    """Further fields: name, number of depths, and whether a depth is a list of tensors."""

    @property
    def sent_width(self) -> int:
        return self.width * (1 + sum(depths for _, depths, _ in self.extras))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FeatureFormat":
        """Inverse of `to_dict`."""
        trailing = data["trailing"]
        return cls(
            width=data["width"],
            trailing=None if trailing is None else tuple(trailing),
            extras=tuple((name, depths, nested) for name, depths, nested in data["extras"]),
        )


def _rows(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.reshape(-1, value.shape[-1])
    parts = [_rows(part) for part in value]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_format(output: Any) -> FeatureFormat:
    """The format of what `get_image_features(..., return_dict=True)`, or that of videos, returned.

    Raises:
        ModelError: it holds no features, or a field whose rows are not those of the features.
    """
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(pooled, (torch.Tensor, list, tuple)):
        raise ModelError(f"the encoder returns {type(output).__name__} without pooler_output: no features.")
    rows = _rows(pooled)
    extras = []
    for name, value in output.items():
        if name in _NOT_SENT or value is None:
            continue
        if not isinstance(value, (list, tuple)) or any(_rows(depth).shape != rows.shape for depth in value):
            raise ModelError(
                f"the encoder returns {name}, whose rows are not those of the features "
                f"({tuple(rows.shape)}): it cannot be sent between stages."
            )
        extras.append((name, len(value), not isinstance(value[0], torch.Tensor)))
    trailing = tuple(pooled.shape[1:]) if isinstance(pooled, torch.Tensor) else None
    return FeatureFormat(width=rows.shape[-1], trailing=trailing, extras=tuple(extras))


def flatten(output: Any, form: FeatureFormat) -> torch.Tensor:
    """The features as `(rows, form.sent_width)`."""
    depths: list[torch.Tensor] = [_rows(output.pooler_output)]
    for name, _, _ in form.extras:
        depths += [_rows(depth) for depth in getattr(output, name)]
    return depths[0] if len(depths) == 1 else torch.cat(depths, dim=1)


def unflatten(rows: torch.Tensor, form: FeatureFormat) -> Any:
    """The features as the LLM's own code takes them in `mm_encoder_outputs`."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    depths: Sequence[torch.Tensor] = rows.split(form.width, dim=1) if form.extras else (rows,)
    pooled = depths[0]
    if form.trailing is not None and len(form.trailing) > 1:
        fits = len(pooled) % _product(form.trailing[:-1]) == 0
        ones = (1,) * (len(form.trailing) - 1)  # items of several sizes: of as many dimensions
        pooled = pooled.reshape(-1, *form.trailing) if fits else pooled.reshape(*ones, *pooled.shape)
    output = BaseModelOutputWithPooling(pooler_output=pooled if form.trailing is not None else [pooled])
    at = 1
    for name, number, nested in form.extras:
        setattr(output, name, [[d] if nested else d for d in depths[at : at + number]])
        at += number
    return output


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
