"""What processes computed, by their CPU clocks: the same run repeated, and what its steps took.

A machine shared with others slows a process down for seconds at a time. The same microbatches are computed by the same
rank in every repetition of a run, so that the median over the repetitions is taken of each of them, not of the whole.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

__all__ = ["RankClocks", "median_clocks", "seconds_and_waiting"]

RankClocks = list[list[dict[str, Any]]]
"""rank → step → seconds: `data` (fetching and collating), `slots` (each microbatch), `optimizer`."""


def median_clocks(repetitions: Sequence[RankClocks]) -> RankClocks:
    """The median of each number over repetitions of one run.

    Raises:
        ValueError: they have other ranks, steps or microbatches.
    """
    return [
        [
            {
                "data": median(step["data"] for step in same),
                "slots": [median(slot) for slot in zip(*(step["slots"] for step in same), strict=True)],
                "optimizer": median(step["optimizer"] for step in same),
            }
            for same in zip(*steps, strict=True)
        ]
        for steps in zip(*repetitions, strict=True)
    ]


def seconds_and_waiting(ranks: RankClocks) -> tuple[float, float]:
    """Seconds of the run, and the share of them that the mean rank waits.

    Ranks meet after fetching, after the last backward and after the optimizer.
    """
    seconds = waited = 0.0
    for steps in zip(*ranks, strict=True):
        busy = [sum(step["slots"]) for step in steps]
        rest = max(step["data"] for step in steps) + max(step["optimizer"] for step in steps)
        seconds += max(busy) + rest
        waited += max(busy) - sum(busy) / len(busy)
    return seconds, waited / seconds
