"""A sample with an image in every microbatch: swaps that repair a grouping in which some have none.

Inputs: a `Problem` whose `is_spread` samples are at least as many as its groups; a grouping. Output: a grouping with
groups of the same sizes, and an `is_spread` sample in each. Caps may be exceeded by it: the search looks after them.
"""

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.problem import Problem

__all__ = ["spread_out"]


def spread_out(problem: Problem, group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Swap samples, alike in cost, until every group has one of `problem.is_spread`; `group` (num_samples,)."""
    if problem.is_spread is None:
        return group
    group = group.copy()
    cost = problem.vision + problem.llm
    count = np.bincount(group[problem.is_spread], minlength=problem.num_groups)
    rank = np.arange(problem.num_groups) % problem.num_ranks
    for bare in np.flatnonzero(count == 0).tolist():
        own = (rank == rank[bare]) & (count > 1)  # from a group of the same rank, if it can be
        donor = int(np.where(own, count, 0).argmax()) if own.any() else int(count.argmax())
        given = np.flatnonzero((group == donor) & problem.is_spread)
        taken = np.flatnonzero(group == bare)
        i, j = np.unravel_index(np.abs(cost[given][:, None] - cost[taken]).argmin(), (given.size, taken.size))
        group[given[i]], group[taken[j]] = bare, donor
        count[donor] -= 1
        count[bare] = 1
    return group
