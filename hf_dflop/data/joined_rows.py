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
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import OBJECTIVES, Assignment
from hf_dflop.cost import CostModel

__all__ = ["priced_by_row", "sample_costs"]

Floats = npt.NDArray[np.float64]


def sample_costs(cost_model: CostModel, tokens: npt.NDArray[np.int64], num_groups: int) -> Floats:
    """Seconds that each sample adds to a row of mean length, `(num_samples,)`."""
    mean = int(tokens.sum()) // num_groups
    step = max(mean // 100, 1)
    below, above = cost_model.llm_s([max(mean - step, 0), mean + step])
    return tokens * float(above - below) / (mean + step - max(mean - step, 0))


def priced_by_row(
    assignment: Assignment,
    cost_model: CostModel,
    vision_s: Floats,
    tokens: npt.NDArray[np.int64],
    baseline: Sequence[Sequence[Sequence[int]]],
    *,
    may_keep: bool,
) -> Assignment:
    """The assignment with the seconds of whole rows, or the stock grouping where it is faster and `may_keep`."""
    own = _Price(assignment.groups, cost_model, vision_s, tokens, assignment.objective)
    stock_groups = tuple(tuple(np.asarray(slot, dtype=np.int64) for slot in rank) for rank in baseline)
    stock = _Price(stock_groups, cost_model, vision_s, tokens, assignment.objective)
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
        self, groups: Any, cost_model: CostModel, vision_s: Floats, tokens: npt.NDArray[np.int64], objective: str
    ) -> None:
        self.groups = groups
        lengths = np.array([[int(tokens[group].sum()) for group in slots] for slots in groups])
        self.llm = cost_model.llm_s(lengths.ravel()).reshape(lengths.shape)
        self.vision = np.array([[float(vision_s[group].sum()) for group in slots] for slots in groups])
        self.seconds = float(OBJECTIVES[objective](self.vision, self.llm))
        lanes = len(groups) * (2 * len(groups[0]) if objective == "pipeline" else 1)
        total = float((self.vision + self.llm).sum())
        self.imbalance = 1.0 - total / (self.seconds * lanes) if self.seconds else 0.0
