"""Which microbatch first? The order in time that the simulator finds quickest.

In: a schedule, `Durations`. Out: the microbatches in the order to run them, and the order of actions. Never slower, by
the simulator, than the order that was given. A pure function of its arguments: every rank computes the same.

Starts: the given order; by LLM seconds, up and down; Johnson's rule for two machines (by what comes before and after
the slowest rank); light ones at both ends and heavy ones between, so that fill and drain are short. Then swaps and
moves, ending by work.

Source: Johnson 1954 (two-machine flow shop); the rest is local search.

Assumptions: all replicas run their k-th microbatch k-th, since an encoder's replica may feed several LLM replicas.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hf_dflop.plan import timing
from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.compiled import (
    CompiledOrder,
    check_fit,
    compile_schedule,
    compiled,
    kernel_args,
    scratch,
    step_seconds,
)
from hf_dflop.plan.durations import Durations
from hf_dflop.plan.order_greedy import greedy_actions

__all__ = ["ChosenOrder", "choose_order", "data_aware_order"]

KINDS = tuple(Kind)
WORK = 1_000_000
"""Actions timed at most, over all orders tried: about 20 ms."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenOrder:
    """The microbatches in the order to run them."""

    microbatches: IntArray
    """`(num_microbatches,)`: which microbatch comes k-th."""
    order: Order
    """Actions that name the microbatches as they were given."""
    step_s: float
    """Simulated seconds of the step."""
    given_s: float
    """The same with the microbatches as given."""


def choose_order(
    durations: Durations,
    *,
    schedule: str,
    stage_rank: Sequence[int],
    first_backward_stage: int = 0,
    max_in_flight: Sequence[int] | None = None,
    seed: int = 0,
    work: int = WORK,
) -> ChosenOrder:
    """Choose in which order the microbatches of a step run.

    Args:
        durations (`Durations`): of the microbatches as given.
        schedule (`str`): a name of `ORDERS`.
        stage_rank (`Sequence[int]`): pipeline rank of each stage.
        first_backward_stage (`int`): stages before it have no backward.
        max_in_flight (`Sequence[int]`, *optional*): for "data-aware", see `greedy_actions`.
        seed (`int`): of the search, such as the step's number.
        work (`int`): actions timed at most.

    Returns:
        `ChosenOrder`: `step_s <= given_s`.

    Raises:
        PlanError: as `make_order` and `step_seconds`.
    """
    ranks = tuple(int(rank) for rank in stage_rank)
    plain = compile_schedule(
        "1f1b" if schedule == "data-aware" else schedule, ranks, durations.num_microbatches, first_backward_stage
    )
    given_s = step_seconds(plain, durations)
    if schedule == "data-aware":
        given = _greedy(plain, durations, plain.position, max_in_flight)
        tried = _better(plain if max_in_flight is None else given, given, durations)
        given_s = step_seconds(tried, durations)
    else:
        tried = plain
    starts = _starts(plain, durations)
    evaluations = max(len(starts), work // max(1, plain.stage.size * int(durations.num_replicas.max())))
    if durations.num_microbatches < 2:
        evaluations, starts = 1, starts[:1]
    run_args, finish_args = kernel_args(tried, durations)
    state = (seed * 2 + 1) * 0x9E3779B97F4A7C15 % 2**64
    found, _ = timing.improve(run_args, finish_args, starts, evaluations, np.uint64(state), *scratch(tried, durations))
    best = replace(tried, position=found)
    if schedule == "data-aware":
        # a list schedule of every start, and of what the search found with the first one's actions
        for position in (*starts, found):
            best = _better(best, _greedy(plain, durations, position, max_in_flight), durations)
    step_s = step_seconds(best, durations)
    if step_s >= given_s:
        best, step_s = tried, given_s
    return ChosenOrder(microbatches=best.position.copy(), order=_as_order(best), step_s=step_s, given_s=given_s)


def data_aware_order(
    durations: Durations,
    *,
    stage_rank: Sequence[int],
    first_backward_stage: int = 0,
    max_in_flight: Sequence[int] | None = None,
    split: bool = False,
) -> Order:
    """The list schedule of the microbatches as given, by their own seconds (the slowest replica's)."""
    ranks = tuple(int(rank) for rank in stage_rank)
    plain = compile_schedule("1f1b", ranks, durations.num_microbatches, first_backward_stage)
    check_fit(plain, durations)
    return _as_order(_greedy(plain, durations, plain.position, max_in_flight, split=split))


def _greedy(
    plain: CompiledOrder,
    durations: Durations,
    position: IntArray,
    max_in_flight: Sequence[int] | None,
    *,
    split: bool = False,
) -> CompiledOrder:
    stage, kind, place = greedy_actions(
        plain.stage_rank.tolist(),
        durations.seconds.max(axis=2)[:, :, position],
        transfer=durations.transfer.max(axis=2)[:, :, position],
        data_ready=durations.data_ready.max(axis=0),
        max_in_flight=max_in_flight,
        first_backward_stage=plain.first_backward,
        split=split,
    )
    return compiled(stage, kind, place, plain.stage_rank, plain.first_backward, np.asarray(position, dtype=np.int64))


def _better(first: CompiledOrder, second: CompiledOrder, durations: Durations) -> CompiledOrder:
    return second if step_seconds(second, durations) < step_seconds(first, durations) else first


def _starts(order: CompiledOrder, durations: Durations) -> IntArray:
    """Orders to begin with, `(K, num_microbatches)`, the given one first."""
    seconds = durations.seconds[:2].max(axis=2).sum(axis=0)  # (S, M), forward and backward of the slowest replica
    load = np.zeros(order.num_ranks)
    np.add.at(load, order.stage_rank, seconds.sum(axis=1))
    slowest = int(load.argmax())
    here = np.flatnonzero(order.stage_rank == slowest)
    before, after = seconds[: here[0] + 1].sum(axis=0), seconds[here[0] :].sum(axis=0)
    total = seconds.sum(axis=0)
    up = np.argsort(total, kind="stable")
    first = np.flatnonzero(before < after)
    last = np.flatnonzero(before >= after)
    johnson = [
        *first[np.argsort(before[first], kind="stable")],
        *last[np.argsort(-after[last], kind="stable")],
    ]
    hill = [*up[::2], *up[1::2][::-1]]
    down = up[::-1]
    return np.array([order.position, up, down, johnson, johnson[::-1], hill], dtype=np.int64)


def _as_order(order: CompiledOrder) -> Order:
    result: Order = [[] for _ in range(order.num_ranks)]
    microbatch = order.position[order.place]
    for s, k, m in zip(order.stage.tolist(), order.kind.tolist(), microbatch.tolist(), strict=True):
        result[order.stage_rank[s]].append(Action(s, KINDS[k], m))
    return result
