"""Measured and predicted seconds of some steps → the numbers that are logged."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hf_dflop.data.step_plan import StepPlan

__all__ = ["step_logs"]

_RANKS_IN_FULL = 16


def step_logs(measured: npt.NDArray[np.float64], plans: Sequence[StepPlan | None]) -> dict[str, float]:
    """The `dflop/` keys of [`DflopCallback`].

    Args:
        measured (`np.ndarray`): `(num_ranks, num_steps, 4)` seconds: data, busy, sync and the whole step.
        plans (`Sequence[StepPlan | None]`): the plan of each step, where there is one.
    """
    logs: dict[str, float] = {}
    made = [plan for plan in plans if plan is not None]
    if made:
        logs["dflop/predicted_idle_stock"] = _mean([plan.assignment.baseline_imbalance for plan in made])
        logs["dflop/predicted_idle"] = _mean([plan.assignment.imbalance for plan in made])
        logs["dflop/gap"] = _mean([plan.assignment.gap for plan in made])
        logs["dflop/scheduling_s"] = _mean([plan.scheduling_s for plan in made])
        logs["dflop/scheduling_wait_s"] = _mean([plan.scheduling_wait_s for plan in made])
    data, busy, sync, step = np.moveaxis(measured, 2, 0)
    logs["dflop/step_s"] = float(step.mean())
    logs["dflop/data_s"] = float(data.mean())
    if np.isfinite(sync).all():
        idle = sync - sync.min(axis=0)
        rank_busy, rank_idle = busy.mean(axis=1), idle.mean(axis=1)
        logs["dflop/idle_fraction"] = float(idle.mean() / step.mean())
        logs["dflop/sync_s"] = float(sync.min(axis=0).mean())
        logs["dflop/busy_s_max"] = float(busy.max(axis=0).mean())
        logs["dflop/busy_s_mean"] = float(busy.mean())
        logs["dflop/slowest_rank"] = float(rank_busy.argmax())
        if len(rank_busy) <= _RANKS_IN_FULL:
            for rank in range(len(rank_busy)):
                logs[f"dflop/busy_s_rank{rank}"] = float(rank_busy[rank])
                logs[f"dflop/idle_s_rank{rank}"] = float(rank_idle[rank])
    return logs


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
