"""What a joined row costs where attention computes all pairs of its tokens, also those of different samples.

SDPA and eager attention take a mask and compute everything under it: a row of T tokens costs what one sample of T
tokens would, f(T), whatever its samples. FlashAttention and flex attention skip what is masked, and a row costs the
sum of its samples.

In: tokens of the samples of a step, and f. Out: seconds of each sample for the search, which adds them up: the slope
of f at the mean row, so that a token costs what it adds to a row of ordinary length. What was found is then priced
with f itself, and the stock grouping kept where it wins after all.

Assumptions: f grows at least in proportion (then a lower bound is every row having the mean length).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import OBJECTIVES, Assignment

__all__ = ["RowCost", "priced_by_row", "sample_costs"]

Floats = npt.NDArray[np.float64]


class RowCost(Protocol):
    """Seconds of rows of given lengths: a `CostModel`, or a version of one."""

    def llm_s(self, tokens: Any) -> Floats:
        """Seconds of rows of `tokens` positions, `(num_rows,)`."""
        ...


def sample_costs(cost_model: RowCost, tokens: npt.NDArray[np.int64], num_groups: int) -> Floats:
    """Seconds that each sample adds to a row of mean length, `(num_samples,)`."""
    mean = int(tokens.sum()) // num_groups
    step = max(mean // 100, 1)
    below, above = cost_model.llm_s([max(mean - step, 0), mean + step])
    return tokens * float(above - below) / (mean + step - max(mean - step, 0))


def priced_by_row(
    assignment: Assignment,
    cost_model: RowCost,
    vision_s: Floats,
    tokens: npt.NDArray[np.int64],
    baseline: Sequence[Sequence[Sequence[int]]],
    *,
    may_keep: bool,
    rank_speeds: Sequence[float] | None = None,
) -> Assignment:
    """The assignment with the seconds of whole rows, or the stock grouping where it is faster and `may_keep`."""
    slowness = np.ones(len(baseline)) if rank_speeds is None else max(rank_speeds) / np.asarray(rank_speeds)
    own = _Price(assignment.groups, cost_model, vision_s, tokens, assignment.objective, slowness)
    stock_groups = tuple(tuple(np.asarray(slot, dtype=np.int64) for slot in rank) for rank in baseline)
    stock = _Price(stock_groups, cost_model, vision_s, tokens, assignment.objective, slowness)
    keeps = assignment.is_baseline
    if may_keep and stock.seconds <= own.seconds:
        own, keeps = stock, True
    num_ranks, num_slots = len(own.groups), len(own.groups[0])
    even = float(cost_model.llm_s([int(tokens.sum()) // (num_ranks * num_slots)])[0]) * num_slots
    bound_s = vision_s.sum() / num_ranks + even
    if assignment.objective == "pipeline":
        bound_s = max(vision_s.sum() / num_ranks, even) / num_slots
    return replace(
        assignment,
        groups=own.groups,
        predicted_s=own.seconds,
        baseline_s=stock.seconds,
        bound_s=min(float(bound_s), own.seconds),
        rank_busy_s=(own.vision + own.llm).sum(axis=1),
        imbalance=own.imbalance,
        baseline_imbalance=stock.imbalance,
        is_baseline=keeps,
    )


class _Price:
    """A grouping with the seconds of its rows."""

    def __init__(
        self,
        groups: Any,
        cost_model: RowCost,
        vision_s: Floats,
        tokens: npt.NDArray[np.int64],
        objective: str,
        slowness: Floats,
    ) -> None:
        self.groups = groups
        lengths = np.array([[int(tokens[group].sum()) for group in slots] for slots in groups])
        self.llm = cost_model.llm_s(lengths.ravel()).reshape(lengths.shape) * slowness[:, None]
        vision = np.array([[float(vision_s[group].sum()) for group in slots] for slots in groups])
        self.vision = vision * slowness[:, None]
        self.seconds = float(OBJECTIVES[objective](self.vision, self.llm))
        lanes = len(groups) * (2 * len(groups[0]) if objective == "pipeline" else 1)
        total = float((self.vision + self.llm).sum())
        self.imbalance = 1.0 - total / (self.seconds * lanes) if self.seconds else 0.0
