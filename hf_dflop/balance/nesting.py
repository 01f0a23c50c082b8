"""From nested groups (rank -> slot -> positions) to a group number per sample, and back in the order of time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.assignment import Groups, check_groups
from hf_dflop.balance.objective import OBJECTIVES
from hf_dflop.balance.problem import Problem
from hf_dflop.errors import BalanceError

__all__ = ["flat_groups", "groups_in_time", "nested_groups", "slots_in_time"]


def flat_groups(baseline: Sequence[Sequence[Any]], problem: Problem) -> npt.NDArray[np.int64]:
    """The baseline as a group of each sample."""
    nested = tuple(tuple(np.asarray(slot) for slot in rank) for rank in baseline)
    if len(nested) != problem.num_ranks or any(len(rank) != problem.num_slots for rank in nested):
        raise BalanceError(
            f"the baseline has {[len(rank) for rank in nested]} microbatches per rank; expected "
            f"num_ranks={problem.num_ranks} times num_slots={problem.num_slots}"
        )
    for rank in nested:
        for slot in rank:
            if slot.ndim != 1 or (slot.size and not np.issubdtype(slot.dtype, np.integer)):
                raise BalanceError("the baseline must hold one-dimensional arrays of sample positions")
    check_groups(nested, problem.num_samples, "the baseline")
    group = np.empty(problem.num_samples, dtype=np.int64)
    for r, rank in enumerate(nested):
        for s, slot in enumerate(rank):
            group[slot] = s * problem.num_ranks + r
    return group


def slots_in_time(problem: Problem, group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`(num_ranks, num_slots)`: the slot that each rank runs first, second, ...: heavy microbatches first where their
    order in time is free."""
    vision, llm = problem.group_costs(group)
    shape = (problem.num_slots, problem.num_ranks)
    v, c = vision.reshape(shape).T, llm.reshape(shape).T  # (num_ranks, num_slots)
    slots = np.tile(np.arange(problem.num_slots), (problem.num_ranks, 1))
    if problem.objective == "step":
        slots = np.argsort(-(v + c), axis=1, kind="stable")
    elif problem.objective in ("slot", "stage"):
        slot_cost = [int(OBJECTIVES[problem.objective](v[:, [s]], c[:, [s]])) for s in range(problem.num_slots)]
        slots = np.tile(np.argsort(-np.array(slot_cost), kind="stable"), (problem.num_ranks, 1))
    return slots


def nested_groups(problem: Problem, group: npt.NDArray[np.int64]) -> Groups:
    """Sample positions per rank and slot, in the order of `slots_in_time`."""
    slots = slots_in_time(problem, group)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group, minlength=problem.num_groups))[:-1])
    return tuple(tuple(members[s * problem.num_ranks + r] for s in slots[r]) for r in range(problem.num_ranks))


def groups_in_time(problem: Problem, group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same as `nested_groups` as a group of each sample: number slot × num_ranks + rank."""
    number = np.empty(problem.num_groups, dtype=np.int64)
    slots = slots_in_time(problem, group)
    ranks = np.arange(problem.num_ranks)[:, None]
    number[slots * problem.num_ranks + ranks] = np.arange(problem.num_slots) * problem.num_ranks + ranks
    return number[group]
