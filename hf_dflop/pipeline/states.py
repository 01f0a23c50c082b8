"""What one stage of an encoder sends the next, images and videos alike: one tensor.

In: hidden states by kind. Out: those of one kind as they are, those of two as numbers one after the other; and back.
"""

import math
from collections.abc import Mapping

import torch

__all__ = ["Shapes", "pack", "packed_size", "unpack"]

Shapes = Mapping[str, tuple[int, ...]]
"""Kind -> the shape of its hidden states."""


def pack(states: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states by kind -> one tensor, of the size `packed_size`."""
    if len(states) == 1:
        return next(iter(states.values()))
    return torch.cat([part.reshape(-1) for part in states.values()])


def packed_size(shapes: Shapes) -> tuple[int, ...]:
    """The shape of what `pack` gives."""
    if len(shapes) == 1:
        return next(iter(shapes.values()))
    return (sum(math.prod(shape) for shape in shapes.values()),)


def unpack(packed: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Inverse of `pack`."""
    if len(shapes) == 1:
        return dict.fromkeys(shapes, packed)
    parts = packed.split([math.prod(shape) for shape in shapes.values()])
    return {kind: part.reshape(shape) for part, (kind, shape) in zip(parts, shapes.items(), strict=True)}
