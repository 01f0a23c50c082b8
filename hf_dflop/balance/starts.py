"""Groupings to start the search from, and the places that the groups take.

Inputs: a `Problem`. Outputs: groupings, each `(num_samples,)` with group g at (rank, slot) = (g mod num_ranks,
g div num_ranks).

Packed: a partition into all microbatches, of both costs where ranks meet between encoder and LLM and of their sum
elsewhere; for "step" also LPT into ranks, whose samples are then
spread over the rank's slots by size. Padded: runs of the order by length, once as even as can be, once with the
least padding. Measured: padded starts that ignore length are no better than random order.
"""

import heapq

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.bound import bound_ticks
from hf_dflop.balance.greedy import lpt_orders, vector_lpt
from hf_dflop.balance.padding import even_runs, least_padding
from hf_dflop.balance.partition import partition_ticks
from hf_dflop.balance.problem import Problem
from hf_dflop.balance.step_bound import MAX_PADDING_CELLS
from hf_dflop.errors import BalanceError

__all__ = ["place", "spread_slots", "starts"]

Groups = npt.NDArray[np.int64]


def starts(problem: Problem, seed: int, kicks: int | None = None) -> list[Groups]:
    """Groupings of all samples, placed; not all need satisfy the caps. `seed`, `kicks`: of the partition's search."""
    both = np.stack([problem.vision, problem.llm], axis=1)
    found: list[Groups] = []
    if problem.padded:
        found += _runs(problem)
    if problem.objective == "step" and not problem.padded:
        rank = _lpt(problem, (problem.vision + problem.llm)[:, None], problem.inverse_speed, capped=False)
        if np.bincount(rank, minlength=problem.num_ranks).min() >= problem.num_slots:
            found.append(spread_slots(problem, rank))
    if not problem.padded:
        ticks = both if problem.objective in ("stage", "pipeline") else both.sum(axis=1)[:, None]
        parts = _partition(problem, ticks, seed, kicks)
        # With ranks of different speed, the parts were already made for their places.
        found.append(place(problem, parts) if problem.is_even else parts)
    if problem.caps.size:
        scale = 2**40 // np.maximum(problem.caps, 1)
        found.append(place(problem, _lpt(problem, problem.weights * scale, np.ones(problem.num_groups))))
    return found


def place(problem: Problem, group: Groups) -> Groups:
    """Renumber groups so that their places suit the objective: what runs at the same time costs the same."""
    vision, llm = problem.group_costs(group)
    order = np.argsort(-(vision + llm), kind="stable")
    number = np.empty(problem.num_groups, dtype=np.int64)
    ranks = problem.num_ranks
    if problem.objective == "step":  # heaviest group first, to the rank with the least so far and a free slot
        slowness = problem.slowness.tolist()
        costs = (vision + llm).tolist()
        taken = [0] * ranks
        if problem.is_even:
            emptiest = [(0, r) for r in range(ranks)]  # a heap of (load, rank) of the ranks with a free slot
            for g in order.tolist():
                load, rank = emptiest[0]
                number[g] = taken[rank] * ranks + rank
                taken[rank] += 1
                if taken[rank] < problem.num_slots:
                    heapq.heapreplace(emptiest, (load + costs[g], rank))
                else:
                    heapq.heappop(emptiest)
        else:
            loads = [0] * ranks
            for g in order.tolist():
                free = (r for r in range(ranks) if taken[r] < problem.num_slots)
                rank = min(free, key=lambda r: ((loads[r] + costs[g]) * slowness[r], r))
                number[g] = taken[rank] * ranks + rank
                loads[rank] += costs[g]
                taken[rank] += 1
    else:  # equals side by side, ranks in alternating direction, or the heaviest of a slot to the fastest rank
        position = np.arange(problem.num_groups)
        slot, rank_of = position // ranks, position % ranks
        fastest = np.argsort(problem.slowness, kind="stable")
        place_of = np.where(slot % 2 == 0, rank_of, ranks - 1 - rank_of) if problem.is_even else fastest[rank_of]
        number[order] = slot * ranks + place_of
    return number[group]


def spread_slots(problem: Problem, rank: Groups) -> Groups:
    """Spread each rank's samples evenly over its slots by memory; `rank` (num_samples,)."""
    size = np.maximum(problem.memory.sum(axis=0), 1)
    costs = np.rint(problem.memory / size * 2.0**30)
    group = np.empty_like(rank)
    ones = np.ones(problem.num_slots)
    order = lpt_orders(costs.astype(np.int64))[0]
    for r in range(problem.num_ranks):
        mine = order[rank[order] == r]
        slot = vector_lpt(np.arange(mine.size), costs[mine], ones, problem.weights[mine], problem.caps)
        group[mine] = slot * problem.num_ranks + r
    return group


def _lpt(
    problem: Problem, ticks: npt.NDArray[np.int64], inverse_speed: npt.NDArray[np.float64], capped: bool = True
) -> Groups:
    weights = problem.weights if capped else problem.weights[:, :0]
    caps = problem.caps if capped else problem.caps[:0]
    order = lpt_orders(ticks)[0]
    bucket: Groups = vector_lpt(order, ticks.astype(np.float64), inverse_speed, weights, caps)
    return bucket


def _partition(problem: Problem, ticks: npt.NDArray[np.int64], seed: int, kicks: int | None) -> Groups:
    """The partition of `ticks` into all microbatches; within the caps where it can be."""
    slow = np.tile(problem.inverse_speed, problem.num_slots)
    bound = bound_ticks(ticks, slow)
    try:
        return partition_ticks(ticks, slow, problem.weights, problem.caps, bound, seed, kicks)[0]
    except BalanceError:  # the caps are too tight for this start; the search repairs another one
        return _lpt(problem, ticks, slow)


def _runs(problem: Problem) -> list[Groups]:
    order = np.argsort(-problem.llm, kind="stable")
    length = problem.llm[order]
    vision = problem.vision[order]
    found = []
    # where encoder and LLM are waited for apart, also runs that are even in the LLM alone
    for cost in [vision, 0 * vision] if problem.objective in ("stage", "pipeline") else [vision]:
        weights = problem.weights[order]
        found.append(even_runs(length, cost, weights, problem.caps, problem.padded_caps, problem.num_groups))
    if problem.num_samples * problem.num_groups <= MAX_PADDING_CELLS:
        found.append(least_padding(length, problem.num_groups)[0])
    groups = []
    for run in found:
        group = np.empty_like(run)
        group[order] = run
        groups.append(place(problem, group))
    return groups
