"""The steps that this rank timed → the same steps with the times of all ranks.

Input: `StepTiming`s of this rank. Output: `MeasuredStep`s, equal on every rank: one gather of a few numbers per step.
With the times travel the last step that a rank has planned and a digest of its costs, so that all ranks declare the
next cost version for the same step, and notice at once if they should ever disagree.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_dflop.data.step_plan import StepPlan
from hf_dflop.data.versions import CostVersions
from hf_dflop.integrations.timing import StepTiming

__all__ = ["MeasuredStep", "gather_steps"]

_FIXED = 6
"""Columns before those of the slots: data, busy, sync, step seconds, last planned step, digest of the costs."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredStep:
    """One optimizer step as all ranks measured it."""

    step: int
    """`global_step` after it."""
    epoch: int
    plan: StepPlan | None
    seconds: npt.NDArray[np.float64]
    """`(num_ranks, 4)`: data, busy, sync and the whole step."""
    slot_s: npt.NDArray[np.float64]
    """`(num_ranks, num_slots)` seconds of each microbatch; NaN where they were not measured."""
    planned_through: npt.NDArray[np.int64]
    """`(num_ranks,)` the last step that each rank had planned when the times were gathered."""
    digest: npt.NDArray[np.int64]
    """`(num_ranks,)` of each rank's newest costs, then."""


def digest_of(costs: CostVersions) -> int:
    """24 bits of a hash of the newest cost version: exact in float32."""
    text = json.dumps(costs.newest.to_dict(), sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)


def gather_steps(
    accelerator: Any,
    timings: Sequence[StepTiming],
    pending: Sequence[tuple[int, int, StepPlan | None]],
    *,
    num_slots: int,
    costs: CostVersions | None,
) -> list[MeasuredStep]:
    """Exchange the times of the steps since the last call; every rank must call it after the same step.

    Args:
        timings (`Sequence[StepTiming]`), pending (`Sequence[tuple]`): of the same steps: times, and (global step,
            epoch, plan).
    """
    rows = np.full((len(timings), _FIXED + num_slots), np.nan)
    for row, timing in zip(rows, timings, strict=True):
        row[:4] = timing.data_s, timing.busy_s, timing.sync_s, timing.step_s
        row[4:6] = (costs.planned_through, digest_of(costs)) if costs is not None else (-1, 0)
        slots = np.diff([timing.begin_s, *timing.slot_end_s])[:num_slots]
        row[_FIXED : _FIXED + len(slots)] = slots
    # float32: devices without float64 gather too, and microseconds are exact enough
    mine = torch.tensor(rows, dtype=torch.float32, device=accelerator.device)
    table = accelerator.gather(mine[None]).cpu().numpy().astype(np.float64)
    return [
        MeasuredStep(
            step=step,
            epoch=epoch,
            plan=plan,
            seconds=table[:, number, :4],
            slot_s=table[:, number, _FIXED:],
            planned_through=table[:, number, 4].astype(np.int64),
            digest=table[:, number, 5].astype(np.int64),
        )
        for number, (step, epoch, plan) in enumerate(pending)
    ]
