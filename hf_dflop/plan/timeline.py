"""What a simulated or recorded step looked like: every action with its times, and sums over it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.actions import Action

__all__ = ["CAUSES", "TimedAction", "Timeline"]

CAUSES: tuple[str, ...] = ("imbalance", "fill_drain", "communication", "data")
"""Why a rank waits."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedAction:
    """One action of one replica, in seconds from the step's begin."""

    rank: int
    """Pipeline rank."""
    replica: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """A step. A line is one replica of one pipeline rank."""

    actions: tuple[TimedAction, ...]
    """In the order of their start."""
    lines: tuple[tuple[int, int], ...]
    """(pipeline rank, replica)."""
    step_s: float
    """Until the last line has updated its parameters."""
    end_s: FloatArray
    """`(num_lines,)`, when each has."""
    reduced_s: FloatArray
    """`(num_lines,)`, when each has its gradients reduced and starts the optimizer."""
    busy_s: FloatArray
    """`(num_lines,)`, its own computation and optimizer."""
    idle_s: dict[str, FloatArray]
    """Cause (of `CAUSES`) -> `(num_lines,)` seconds; they add up to `step_s - busy_s`."""
    peak_in_flight: npt.NDArray[np.int64]
    """`(num_lines,)`: most microbatches at once whose first forward on the line began and whose last backward there is
    not over."""
    peak_bytes: FloatArray | None
    """`(num_lines,)`: the most that they hold; None where bytes were not given."""
    num_stages: int
    num_microbatches: int

    @property
    def idle_fraction(self) -> float:
        """Idle ÷ all seconds, over all lines."""
        total = self.step_s * len(self.lines)
        return float(1.0 - self.busy_s.sum() / total) if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Sums as plain JSON types, without the single actions."""
        return {
            "step_s": self.step_s,
            "idle_fraction": self.idle_fraction,
            "lines": [
                {
                    "pipeline_rank": rank,
                    "replica": replica,
                    "busy_s": float(self.busy_s[i]),
                    "idle_s": {cause: float(self.idle_s[cause][i]) for cause in CAUSES},
                    "peak_in_flight": int(self.peak_in_flight[i]),
                    "peak_bytes": None if self.peak_bytes is None else float(self.peak_bytes[i]),
                }
                for i, (rank, replica) in enumerate(self.lines)
            ],
        }
