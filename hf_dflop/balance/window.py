"""Pair giant samples across a few steps, so that one giant does not leave all other ranks waiting.

Inputs: seconds of each sample of a window of consecutive steps, and the ranks. Output: which samples make up each
step, as many as before. A pure function of its arguments.

A step takes at least as long as its largest sample. Two steps with a giant each wait twice; with both giants in one
step, on a rank each, they wait once. Giants are samples above the window's mean load of a rank and step; they are
gathered, as many to a step as there are ranks, into the steps that hold most of them already, in exchange for the
smallest samples there. Nothing moves unless that is predicted to save time.

What it changes for the optimizer: a sample may be used up to `num_steps - 1` steps earlier or later than in the stock
order (every sample still once an epoch), and giants come together in a step. That is no longer the stock run.

Assumptions: a step's time is the larger of its mean load per rank and its largest sample (packed, ranks meet once).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.checks import checked_costs
from hf_dflop.errors import BalanceError

__all__ = ["pair_giants"]

LEAST_GAIN = 1e-3
"""Share of the window's time that moving samples must save."""


def pair_giants(costs: Any, sizes: Sequence[int], num_ranks: int) -> list[npt.NDArray[np.int64]]:
    """Regroup the samples of a window of steps.

    Args:
        costs (`npt.ArrayLike`): `(num_samples,)` seconds, step after step in the stock order.
        sizes (`Sequence[int]`): samples of each step; they add up to `num_samples`.
        num_ranks (`int`): ranks that share a step.

    Returns:
        `list[np.ndarray]`: for each step the positions of its samples, ascending, as many as `sizes` says.

    Raises:
        BalanceError: costs that are not finite and >= 0, or sizes that do not add up.

    Example:
        Two ranks, two steps with one giant each: 10 + 10 seconds become 11 + 2.

        >>> [step.tolist() for step in pair_giants([10, 1, 1, 1, 1, 1, 10, 1], [4, 4], 2)]
        [[0, 2, 3, 6], [1, 4, 5, 7]]
    """
    seconds = checked_costs(costs)
    if seconds.shape[1] != 1 or sum(sizes) != len(seconds) or min(sizes, default=0) < 1 or num_ranks < 1:
        raise BalanceError(
            f"costs has shape {np.shape(costs)}, sizes add up to {sum(sizes)} and num_ranks is {num_ranks}; expected "
            "one second per sample, a size >= 1 per step that add up to the samples, and at least one rank"
        )
    cost = seconds[:, 0]
    edges = np.cumsum([0, *sizes])
    stock = np.repeat(np.arange(len(sizes)), sizes)
    giant = cost > cost.sum() / (num_ranks * len(sizes))
    best, best_s = stock, _window_s(cost, stock, len(sizes), num_ranks)
    needed_s = best_s * (1 - LEAST_GAIN)
    for num_giants in range(2, int(giant.sum()) + 1):
        # Giants of like size belong together: the largest first, or all but the smallest.
        order = np.lexsort((np.arange(cost.size), -cost))[:num_giants]
        candidate = _gather(cost, stock, order, sizes, num_ranks)
        found_s = _window_s(cost, candidate, len(sizes), num_ranks)
        if found_s < min(best_s, needed_s):
            best, best_s = candidate, found_s
    if best is stock:
        return [np.arange(begin, end) for begin, end in itertools.pairwise(edges)]
    return [np.flatnonzero(best == step) for step in range(len(sizes))]


def _window_s(cost: npt.NDArray[np.float64], step: npt.NDArray[np.int64], num_steps: int, num_ranks: int) -> float:
    """Predicted seconds of the window: of each step the larger of mean load and largest sample."""
    largest = np.zeros(num_steps)
    np.maximum.at(largest, step, cost)
    mean = np.bincount(step, weights=cost, minlength=num_steps) / num_ranks
    return float(np.maximum(largest, mean).sum())


def _gather(
    cost: npt.NDArray[np.float64],
    stock: npt.NDArray[np.int64],
    giants: npt.NDArray[np.int64],
    sizes: Sequence[int],
    num_ranks: int,
) -> npt.NDArray[np.int64]:
    """`giants` (largest first) in blocks of `num_ranks`, a block to a step; the step of each sample."""
    step = stock.copy()
    is_giant = np.zeros(cost.size, dtype=bool)
    is_giant[giants] = True
    free = list(range(len(sizes)))
    for begin in range(0, giants.size, num_ranks):
        block = giants[begin : begin + num_ranks]
        if not free:
            break
        held = np.bincount(step[block], minlength=len(sizes))
        target = max(free, key=lambda k: (int(held[k]), -k))
        free.remove(target)
        in_block = np.zeros(cost.size, dtype=bool)
        in_block[block] = True
        for sample in block[step[block] != target]:
            own = np.flatnonzero((step == target) & ~in_block)
            if not own.size:
                break
            # Another block's giant leaves first, then the smallest sample.
            given = own[np.lexsort((own, cost[own], ~is_giant[own]))[0]]
            step[given], step[sample] = step[sample], target
    return step
