"""Reads what the demo's runs left behind, and reduces it to the numbers of the table."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from recipes.demo.settings import ARMS, OWN_ARMS

__all__ = ["ArmSummary", "load_runs", "percent", "spread", "summarize"]

Runs = dict[str, list[dict[str, Any]]]
"""For every arm, its runs by round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmSummary:
    """One row of the table; lists have one entry per round."""

    arm: str
    samples_per_s: list[float]
    ratio_to_stock: list[float]
    """Samples per second ÷ those of the stock sampler in the same round."""
    ratio_of_balanced: list[float]
    """Samples per second of `balanced` ÷ those of this arm in the same round."""
    ratio_of_packed: list[float]
    """Samples per second of `packed` ÷ those of this arm in the same round."""
    wall_to_compute: list[float]
    """Seconds of the run ÷ what the mean rank spent on microbatches; 1: nobody waits, and nothing else takes time."""
    idle_fraction: list[float]
    padding_share: float
    predicted_idle: float | None
    peak_memory_gib: float

    @property
    def spread(self) -> str:
        """Median of the ratio to stock, with the smallest and largest."""
        return spread(self.ratio_to_stock)


def spread(values: list[float], digits: int = 2) -> str:
    """`median (min–max)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def percent(shares: list[float]) -> str:
    """`median (min–max) %`."""
    return f"{spread([100 * share for share in shares], 1)} %"


def load_runs(folder: Path) -> Runs:
    """The finished runs of `folder`, by arm and round.

    Raises:
        FileNotFoundError: an arm has no finished run.
    """
    runs: Runs = {}
    for arm in ARMS:
        paths = sorted(folder.glob(f"{arm}-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
        if not paths:
            raise FileNotFoundError(f"no finished run of {arm!r} in {folder}; run the demo again.")
        runs[arm] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return runs


def summarize(runs: Runs) -> list[ArmSummary]:
    """One summary per arm, in the order of `ARMS`."""
    return [
        ArmSummary(
            arm=arm,
            samples_per_s=[run["samples_per_s"] for run in runs[arm]],
            ratio_to_stock=[
                run["samples_per_s"] / stock["samples_per_s"]
                for run, stock in zip(runs[arm], runs["stock"], strict=True)
            ],
            ratio_of_balanced=[
                balanced["samples_per_s"] / run["samples_per_s"]
                for run, balanced in zip(runs[arm], runs["balanced"], strict=True)
            ],
            ratio_of_packed=[
                packed["samples_per_s"] / run["samples_per_s"]
                for run, packed in zip(runs[arm], runs["packed"], strict=True)
            ],
            wall_to_compute=[_wall_to_compute(run) for run in runs[arm]],
            idle_fraction=[run["idle_fraction"] for run in runs[arm]],
            padding_share=runs[arm][0]["padding_share"],
            predicted_idle=_predicted_idle(runs[arm][0]),
            peak_memory_gib=max(max(run["peak_memory_bytes"]) for run in runs[arm]) / 2**30,
        )
        for arm in runs
    ]


def _wall_to_compute(run: dict[str, Any]) -> float:
    spent = [sum(step["slot_end_s"][-1] - step["begin_s"] for step in steps) for steps in run["ranks"]]
    return float(run["seconds"] * len(spent) / sum(spent))


def _predicted_idle(run: dict[str, Any]) -> float | None:
    key = "dflop/predicted_idle" if run["arm"] in OWN_ARMS else "dflop/predicted_idle_stock"
    logs = [log for log in run["logs"] if key in log]
    if not logs:
        return None
    return sum(log[key] * log["dflop/step_s"] for log in logs) / sum(log["dflop/step_s"] for log in logs)
