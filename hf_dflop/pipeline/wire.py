"""What a stage is told: how tensors travel, and the inputs of one call.

In: settings of the model and of a call. Out: records that every stage of a rank shares.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_dflop.pipeline.bridge import Route
from hf_dflop.pipeline.kinds import Formats
from hf_dflop.pipeline.shape import StepShape

__all__ = ["StageStep", "Wire"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """How tensors travel."""

    dtype: torch.dtype
    device: torch.device
    llm_widths: tuple[int, ...]
    """Numbers that each LLM stage sends for a position."""
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


@dataclass(kw_only=True, slots=True)
class StageStep:
    """What a stage needs for one call; made anew for each."""

    shape: StepShape
    routes: tuple[Route, ...]
    inputs: list[Mapping[str, Any] | None]
    """Of each microbatch: vision inputs on stages of the encoder, text inputs on the others."""
    forms: Formats
    loss_divisor: torch.Tensor | None = None
    """Of all losses; `None`: of each its microbatch's own label tokens."""
    loss_scale: float | torch.Tensor = 1.0
    backward: bool = True
    keep_logits: bool = False
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
