"""What a step costs, given the vision and LLM cost of every microbatch: one function per way that ranks meet.

Inputs: vision and LLM cost, each `(num_ranks, num_slots)`; slot s of a rank is the microbatch that it runs s-th.
Output: the number to minimise. Costs may be seconds or whole ticks.

Source: ranks wait for the slowest wherever they synchronise, so the sync points decide what has to be equal.

Assumptions: communication and the optimizer take the same time whatever the grouping; encoder and LLM of a rank run
one after the other, except in "pipeline", where they run on ranks of their own.
"""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

__all__ = ["OBJECTIVES", "objective_code", "pipeline", "slot", "stage", "step"]

Costs = npt.NDArray[Any]


def step(vision: Costs, llm: Costs) -> Any:
    """Ranks meet once per step (DDP, accumulation under `no_sync`): the busiest rank's sum over slots."""
    return (vision + llm).sum(axis=1).max()


def slot(vision: Costs, llm: Costs) -> Any:
    """Ranks meet after every microbatch (a gather or an all-reduce in each): the sum of each slot's slowest."""
    return (vision + llm).max(axis=0).sum()


def stage(vision: Costs, llm: Costs) -> Any:
    """Ranks meet in every layer (FSDP, ZeRO-3): per slot the slowest encoder, then the slowest LLM."""
    return vision.max(axis=0).sum() + llm.max(axis=0).sum()


def pipeline(vision: Costs, llm: Costs) -> Any:
    """Encoder and LLM on their own ranks: the slowest stage of any microbatch sets the beat."""
    return max(vision.max(), llm.max())


OBJECTIVES: dict[str, Callable[[Costs, Costs], Any]] = {
    "step": step,
    "slot": slot,
    "stage": stage,
    "pipeline": pipeline,
}
"""Objectives by name. Their order is the numbering that the compiled search uses."""


def objective_code(name: str) -> int:
    """Position of objective `name` in `OBJECTIVES`.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
    return list(OBJECTIVES).index(name)
