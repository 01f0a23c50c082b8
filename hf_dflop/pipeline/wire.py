"""How tensors travel between stages, and in which type a stage computes."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Wire"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """How tensors travel."""

    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    autocast: torch.dtype | None = None

    def context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {key: _to(value, self.device) for key, value in inputs.items()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(part, device) for key, part in value.items()}
    return value
