"""What one optimizer step was planned to be, and what a microbatch may hold at most.

In: nothing. Out: the records that the samplers give to the log, the trace and the correction of costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import Assignment
from hf_dflop.data.versions import CostVersion
from hf_dflop.shapes import Shapes

__all__ = ["Caps", "Microbatches", "StepPlan", "stock_caps"]

Microbatches = Sequence[Sequence[int]]
"""The index lists that one rank loads, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """The most that one microbatch may hold; `None` means no cap."""

    max_tokens: int | None = None
    """LLM positions that are computed (padded: rows × longest)."""
    max_patches: int | None = None
    """Encoder patches, and frames of sounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """How one optimizer step was grouped, and why."""

    epoch: int
    step: int
    """Optimizer step within the epoch."""
    assignment: Assignment
    indices: npt.NDArray[np.int64]
    """`(num_samples,)` dataset index of each position of the assignment."""
    stock: Sequence[Microbatches]
    """Dataset indices of the stock grouping: rank → slot → indices."""
    balanced: bool
    """Whether the assignment is what runs; `False` keeps the stock grouping."""
    scheduling_s: float
    """Seconds that making this plan took."""
    scheduling_wait_s: float = 0.0
    """Seconds of them (and of the plans before it) that the loop had to wait."""
    cost_version: CostVersion | None = None
    """What the costs come from; None where they never change."""
    has_image: bool = True
    """Whether any sample of the step has an image (or a sound)."""

    def microbatches(self, rank: int) -> list[list[int]]:
        """The dataset indices that `rank` loads, one list per slot."""
        if not self.balanced:
            return [list(group) for group in self.stock[rank]]
        return [self.indices[group].tolist() for group in self.assignment.groups[rank]]


def stock_caps(shapes: Shapes, batch_size: int) -> Caps:
    """Caps that the stock sampler could have reached: `batch_size` samples as large as the largest one.

    With them, balancing can never need more memory than an unlucky stock microbatch.
    """
    return Caps(
        max_tokens=batch_size * int(shapes.llm_tokens.max()),
        max_patches=max(batch_size * int(shapes.encoder_inputs.max()), 1),
    )
