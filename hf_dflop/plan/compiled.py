"""An order as arrays, and the quick answer: the seconds of a step, for searches that ask thousands of times.

In: an `Order` (or a schedule's name) and `Durations`. Out: seconds. `simulate.simulate` gives the same step with a
record of every action; a test holds the two against each other.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import PlanError
from hf_dflop.plan import timing
from hf_dflop.plan.actions import Kind, Order
from hf_dflop.plan.check_order import OrderFacts, check_order, dry_run
from hf_dflop.plan.durations import Durations
from hf_dflop.plan.orders import make_order

__all__ = ["CompiledOrder", "batch_seconds", "compile_order", "compile_schedule", "step_seconds"]

KIND_CODE = {kind: code for code, kind in enumerate(Kind)}
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CompiledOrder:
    """An order that was found runnable. Microbatches are numbered by place: in the sequence of the first stage."""

    stage: IntArray
    """`(num_actions,)`, each action after all that it waits for."""
    kind: IntArray
    """`(num_actions,)`, places in `Kind`."""
    place: IntArray
    """`(num_actions,)`, the how-many-th microbatch it is."""
    position: IntArray
    """`(num_microbatches,)`: place -> microbatch."""
    stage_rank: IntArray
    """`(num_stages,)`, pipeline rank of each stage."""
    last_action: IntArray
    """`(num_ranks,)`, the last of each rank's actions."""
    first_backward: int
    """Stages before it have no backward."""

    @property
    def num_ranks(self) -> int:
        return self.last_action.size


def compile_order(order: Order) -> CompiledOrder:
    """Check an order and turn it into arrays.

    Raises:
        PlanError: it cannot be run, see `check_order` and `dry_run`.
    """
    return _arrays(order, check_order(order))


def _arrays(order: Order, facts: OrderFacts) -> CompiledOrder:
    actions = [action for rank in order for action in rank]
    codes = np.array([(a.stage, KIND_CODE[a.kind], a.microbatch) for a in actions], dtype=np.int64)
    stage, kind, microbatch = np.ascontiguousarray(codes.T)
    starts = np.cumsum([0, *map(len, order)])
    position = microbatch[(stage == 0) & (kind == 0)]
    places = np.empty_like(position)
    places[position] = np.arange(position.size)
    place = places[microbatch]
    num_stages = len(facts.stage_rank)
    split = np.zeros(num_stages, dtype=np.bool_)
    split[stage[kind == KIND_CODE[Kind.BACKWARD_INPUT]]] = True
    line = np.empty_like(stage)
    if timing.line_up(stage, kind, place, starts, num_stages, position.size, split, line) < line.size:
        dry_run(order, facts)  # says which rank waits for what
    return compiled(stage[line], kind[line], place[line], facts.stage_rank, facts.first_backward_stage, position)


def compiled(
    stage: IntArray, kind: IntArray, place: IntArray, stage_rank: Any, first_backward: int, position: IntArray
) -> CompiledOrder:
    """A `CompiledOrder` from arrays that are known to be runnable."""
    ranks = np.asarray(stage_rank, dtype=np.int64)
    last = np.full(int(ranks.max()) + 1, -1, dtype=np.int64)
    last[ranks[stage]] = np.arange(stage.size)  # the last of equal indices stays
    return CompiledOrder(
        stage=stage,
        kind=kind,
        place=place,
        position=position,
        stage_rank=ranks,
        last_action=last,
        first_backward=first_backward,
    )


@lru_cache(maxsize=128)
def compile_schedule(
    schedule: str, stage_rank: tuple[int, ...], num_microbatches: int, first_backward_stage: int = 0
) -> CompiledOrder:
    """The compiled order of a schedule by name; kept, since a search asks for few of them very often."""
    order = make_order(
        schedule,
        stage_rank=stage_rank,
        num_microbatches=num_microbatches,
        first_backward_stage=first_backward_stage,
    )
    return _arrays(order, OrderFacts(tuple(stage_rank), num_microbatches, first_backward_stage))


def step_seconds(order: CompiledOrder, durations: Durations) -> float:
    """Seconds of a step: all actions, gradient reduction and the optimizer, of the slowest rank.

    Args:
        order (`CompiledOrder`): see `compile_schedule` and `compile_order`.
        durations (`Durations`): of the same stages and microbatches.

    Raises:
        PlanError: the durations are of other stages, microbatches or ranks.
    """
    return float(timing.step_s(*kernel_args(order, durations), order.position, *scratch(order, durations)))


def batch_seconds(
    order: CompiledOrder, durations: Durations, seconds: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Seconds of many steps that differ in the seconds of their actions alone, `(num_steps,)`.

    Args:
        order (`CompiledOrder`): of all of them.
        durations (`Durations`): everything but `seconds`.
        seconds: `(num_steps, 4, num_stages, num_replicas, num_microbatches)`, as `Durations.seconds`.

    Raises:
        PlanError: as `step_seconds`, or `seconds` of another shape.
    """
    if seconds.ndim != 5 or seconds.shape[1:] != durations.seconds.shape:
        raise PlanError(f"seconds has the shape {seconds.shape}; it must be (steps, *{durations.seconds.shape}).")
    given = np.ascontiguousarray(seconds, dtype=np.float64)
    return timing.batch(*kernel_args(order, durations), order.position, given, *scratch(order, durations))


def kernel_args(order: CompiledOrder, durations: Durations) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The first two arguments of `timing.step_s` and `timing.improve`."""
    check_fit(order, durations)
    rank_replicas = np.zeros(order.num_ranks, dtype=np.int64)
    rank_replicas[order.stage_rank] = durations.num_replicas
    per_rank = [
        np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype=np.float64), (order.num_ranks,)))
        for value in (
            durations.reduce_s,
            durations.reduce_s if durations.reduce_tail_s is None else durations.reduce_tail_s,
            durations.optimizer_s,
        )
    ]
    run_args = (
        order.stage,
        order.kind,
        order.place,
        order.stage_rank,
        durations.num_replicas,
        order.first_backward,
        durations.seconds,
        durations.transfer,
        durations.data_ready,
        durations.floor,
        durations.lockstep,
        durations.bridge,
        durations.forward_from,
        durations.backward_from,
    )
    return run_args, (rank_replicas, per_rank[0], per_rank[1], order.last_action, per_rank[2])


def scratch(order: CompiledOrder, durations: Durations) -> tuple[Any, ...]:
    """Room for the results of the kernel: start, end (not kept), free, ends."""
    lines = (order.num_ranks, durations.seconds.shape[2])
    return np.empty((0, 0, 0, 0)), np.empty((0, 0, 0, 0)), np.zeros(lines), np.zeros(lines)


def check_fit(order: CompiledOrder, durations: Durations) -> None:
    """Raise a `PlanError` unless the durations are of the order's stages, microbatches and ranks."""
    wanted = (order.stage_rank.size, order.position.size)
    if (durations.num_stages, durations.num_microbatches) != wanted:
        raise PlanError(
            f"the order has {wanted[0]} stages and {wanted[1]} microbatches, the durations "
            f"{durations.num_stages} and {durations.num_microbatches}."
        )
    replicas = np.zeros(order.num_ranks, dtype=np.int64)
    replicas[order.stage_rank] = durations.num_replicas
    if (wrong := replicas[order.stage_rank] != durations.num_replicas).any():
        rank = int(order.stage_rank[wrong][0])
        counts = sorted(set(durations.num_replicas[order.stage_rank == rank].tolist()))
        raise PlanError(f"the stages on rank {rank} have {counts} replicas; they must have the same.")
    for name in ("reduce_s", "reduce_tail_s", "optimizer_s"):
        value = getattr(durations, name)
        shape = () if value is None else np.shape(value)
        if shape not in ((), (order.num_ranks,)):
            raise PlanError(f"{name} has the shape {shape}; give one number or {order.num_ranks}, one for each rank.")
