"""Play a step: when each action starts and ends, what ranks wait for, what they hold in memory.

In: an `Order` and `Durations`. Out: a `Timeline` with a record of every action of every replica. Event by event: a
rank that is free starts its next action as soon as its input is there. `compiled.step_seconds` computes the same step
without records.

Idle seconds are split by what would make them go away. Each cause is what the step would save without it:
data: if the data were there at once; communication: if transfers, gathering and reduction took no time. Of what is
left, *fill and drain* is what the same order waits where all ranks have equal work and all microbatches are equal, and
*imbalance* is the rest. The four add up to the idle seconds, of every rank.

Assumptions: see `durations`. Activations are held from the start of a forward to the end of its backward (of its
weight part, where the backward is split).
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import PlanError
from hf_dflop.plan import timing
from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.check_order import needs
from hf_dflop.plan.compiled import CompiledOrder, check_fit, compile_order, kernel_args, scratch
from hf_dflop.plan.durations import Durations
from hf_dflop.plan.timeline import CAUSES, TimedAction, Timeline

__all__ = ["most_in_flight", "simulate_order"]

KINDS = tuple(Kind)
CODE = {kind: code for code, kind in enumerate(Kind)}
FloatArray = npt.NDArray[np.float64]


def simulate_order(
    order: Order,
    durations: Durations,
    *,
    activation_bytes: Sequence[Any] | None = None,
    put_off_bytes: Sequence[Any] | None = None,
) -> Timeline:
    """Play one step.

    Args:
        order (`Order`): pipeline rank -> actions; all replicas follow it.
        durations (`Durations`): what each action takes.
        activation_bytes (*optional*):
            One entry per stage, a number or `(num_replicas, num_microbatches)`: what a microbatch holds between its
            forward and its backward.
        put_off_bytes (*optional*): the same, beside it between the two parts of a split backward.

    Returns:
        `Timeline`.

    Raises:
        PlanError: an order that cannot be run, or durations that do not fit it.

    Example:
        Two stages, two microbatches, forward 1 s, backward 2 s: (2 + 1) × 3 s, of which each rank waits 3.

        >>> from hf_dflop.plan.orders import make_order
        >>> order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=2)
        >>> timeline = simulate_order(order, Durations.of([[1, 1], [1, 1]], [[2, 2], [2, 2]]))
        >>> timeline.step_s, timeline.idle_s["fill_drain"].tolist()
        (9.0, [3.0, 3.0])
    """
    compiled = compile_order(order)
    check_fit(compiled, durations)
    lines = [
        (rank, replica)
        for rank in range(compiled.num_ranks)
        for replica in range(int(durations.num_replicas[compiled.stage_rank == rank].max()))
    ]
    actions, free = _play(order, compiled, durations)
    _, finish_args = kernel_args(compiled, durations)
    ends = _reduce(actions, free, compiled, durations, finish_args)
    step_s = float(max(ends[line] for line in lines))
    number = {line: i for i, line in enumerate(lines)}
    busy = np.zeros(len(lines))
    for timed in actions:
        busy[number[timed.rank, timed.replica]] += _own_s(durations, timed)
    busy += np.array([finish_args[4][rank] for rank, _ in lines])
    held = _held(durations, activation_bytes)
    return Timeline(
        actions=tuple(actions),
        lines=tuple(lines),
        step_s=step_s,
        end_s=np.array([ends[line] for line in lines]),
        reduced_s=np.array([ends[line] - finish_args[4][line[0]] for line in lines]),
        busy_s=busy,
        idle_s=_idle(compiled, durations, lines, step_s, busy),
        peak_in_flight=_microbatches_in_flight(order, lines),
        peak_bytes=None if held is None else most_in_flight(order, held, _held(durations, put_off_bytes)),
        num_stages=durations.num_stages,
        num_microbatches=durations.num_microbatches,
    )


def _own_s(durations: Durations, timed: TimedAction) -> float:
    """Seconds of the action itself, without waiting for others in lockstep or for parameters."""
    action = timed.action
    return float(durations.seconds[CODE[action.kind], action.stage, timed.replica, action.microbatch])


def _play(
    order: Order, compiled: CompiledOrder, durations: Durations
) -> tuple[list[TimedAction], dict[tuple[int, int], float]]:
    """Every action with its times, and when each (rank, replica) has done the last."""
    num_stages = durations.num_stages
    split = [any(a.kind is Kind.BACKWARD_INPUT and a.stage == s for r in order for a in r) for s in range(num_stages)]
    place = {int(m): i for i, m in enumerate(compiled.position)}
    # a unit is what starts together: one replica of a rank, or those in lockstep
    units = []
    for rank in range(compiled.num_ranks):
        count = int(durations.num_replicas[compiled.stage_rank == rank].max())
        for first in range(0, count, durations.lockstep):
            units.append((rank, tuple(range(first, first + durations.lockstep))))
    at = [0] * len(units)
    free = {(rank, replica): 0.0 for rank, replicas in units for replica in replicas}
    arrived: dict[tuple[Action, int], float] = {}  # (what, its sender's replica) -> when
    link: dict[tuple[int, Kind, int], float] = {}
    waiting: dict[tuple[Action, int], list[int]] = {}
    done: list[TimedAction] = []
    events = [(0.0, unit) for unit in range(len(units))]
    heapq.heapify(events)
    while events:
        now, unit = heapq.heappop(events)
        rank, replicas = units[unit]
        if at[unit] == len(order[rank]):
            continue
        action = order[rank][at[unit]]
        stage, kind, microbatch = action.stage, action.kind, action.microbatch
        inputs = [
            (need, sender)
            for need in needs(action, num_stages, stage + 1 < num_stages and split[stage + 1])
            for replica in replicas
            for sender in _senders(durations, action, need, replica)
            if need.stage != stage
        ]
        missing = next((item for item in inputs if item not in arrived), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(unit)
            continue
        begin = max([free[rank, replica] for replica in replicas] + [arrived[item] for item in inputs])
        if stage == 0 and kind is Kind.FORWARD:
            begin = max(begin, *(durations.data_ready[replica, place[microbatch]] for replica in replicas))
        if begin > now:
            heapq.heappush(events, (float(begin), unit))
            continue
        code = CODE[kind]
        took = max(durations.floor[code, stage], *(durations.seconds[code, stage, r, microbatch] for r in replicas))
        end = float(now + took)
        at[unit] += 1
        heapq.heappush(events, (end, unit))
        for replica in replicas:
            free[rank, replica] = end
            done.append(TimedAction(rank=rank, replica=replica, action=action, start_s=now, end_s=end))
            sent = end
            way = 0 if kind is Kind.FORWARD else 1
            length = float(durations.transfer[way, stage, replica, microbatch])
            if length > 0 and kind is not Kind.BACKWARD_WEIGHT and (way == 0 or stage > compiled.first_backward):
                lane = Kind.FORWARD if way == 0 else Kind.BACKWARD
                sent = max(end, link.get((stage, lane, replica), 0.0)) + length
                link[stage, lane, replica] = sent
            arrived[action, replica] = sent
            for waiter in waiting.pop((action, replica), ()):
                heapq.heappush(events, (now, waiter))
    assert all(at[unit] == len(order[rank]) for unit, (rank, _) in enumerate(units)), "an order that was checked"
    return done, free


def _senders(durations: Durations, action: Action, need: Action, replica: int) -> range:
    """Replicas of `need` that this replica of `action` waits for."""
    if action.kind is Kind.FORWARD and need.stage == durations.bridge:
        low, high = durations.forward_from[replica, action.microbatch]
        return range(low, high)
    if action.kind is not Kind.FORWARD and action.stage == durations.bridge and need.stage == action.stage + 1:
        low, high = durations.backward_from[replica, action.microbatch]
        return range(low, high)
    return range(replica, replica + 1)


def _reduce(
    actions: list[TimedAction],
    free: dict[tuple[int, int], float],
    compiled: CompiledOrder,
    durations: Durations,
    finish_args: Any,
) -> dict[tuple[int, int], float]:
    """When each line is through gradient reduction and the optimizer."""
    _, reduce_s, tail_s, _, optimizer_s = finish_args
    last: dict[tuple[int, int], TimedAction] = {}
    for timed in actions:  # in time
        last[timed.rank, timed.replica] = timed
    ends = {}
    for rank in range(compiled.num_ranks):
        own = [line for line in free if line[0] == rank]
        slowest = max(free[line] for line in own)
        hides = [0.0 if last[line].action.kind is Kind.FORWARD else _own_s(durations, last[line]) for line in own]
        shown = max(reduce_s[rank] - min(hides), tail_s[rank])
        for line in own:
            ends[line] = (slowest + shown if reduce_s[rank] > 0 else free[line]) + optimizer_s[rank]
    return ends


def most_in_flight(order: Order, held: Sequence[Any], put_off: Sequence[Any] | None = None) -> FloatArray:
    """The most of `held` on each line at once, `(num_lines,)`: it needs no seconds, since a rank's order is fixed.

    Args:
        order (`Order`): pipeline rank -> actions.
        held: one entry per stage, `(num_replicas, num_microbatches)`.
        put_off (*optional*): the same, held beside between the two parts of a split backward.
    """
    rows = [np.atleast_2d(np.asarray(given, dtype=np.float64)) for given in held]
    most = []
    for actions in order:
        trained = {action.stage for action in actions if action.kind is not Kind.FORWARD}
        total = np.zeros(rows[actions[0].stage].shape[0])
        peak = total.copy()
        for action in actions:
            here = rows[action.stage][:, action.microbatch]
            beside = 0.0 if put_off is None else put_off[action.stage][:, action.microbatch]
            if action.kind is Kind.FORWARD:
                np.maximum(peak, total + here, out=peak)
                if action.stage in trained:
                    total += here
            elif action.kind is Kind.BACKWARD_INPUT:
                total += beside
                np.maximum(peak, total, out=peak)
            else:
                total -= here + (beside if action.kind is Kind.BACKWARD_WEIGHT else 0.0)
        most.append(peak)
    return np.concatenate(most)


def _microbatches_in_flight(order: Order, lines: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Most microbatches in flight at once on each line."""
    most = []
    for actions in order:
        trained = {action.stage for action in actions if action.kind is not Kind.FORWARD}
        stages: Counter[int] = Counter()  # microbatch -> stages that hold it
        peak = 0
        for action in actions:
            if action.kind is Kind.FORWARD:
                peak = max(peak, 1 + sum(1 for microbatch in stages if microbatch != action.microbatch))
                if action.stage in trained:
                    stages[action.microbatch] += 1
            elif action.kind is not Kind.BACKWARD_INPUT:
                stages[action.microbatch] -= 1
                if not stages[action.microbatch]:
                    del stages[action.microbatch]
        most.append(peak)
    return np.array([most[rank] for rank, _ in lines], dtype=np.int64)


def _held(durations: Durations, activation_bytes: Sequence[Any] | None) -> list[FloatArray] | None:
    """`activation_bytes` as one array per stage."""
    if activation_bytes is None:
        return None
    if len(activation_bytes) != durations.num_stages:
        raise PlanError(f"activation_bytes has {len(activation_bytes)} entries for {durations.num_stages} stages.")
    shape = durations.num_microbatches
    return [
        np.broadcast_to(np.asarray(given, dtype=np.float64), (int(durations.num_replicas[stage]), shape))
        for stage, given in enumerate(activation_bytes)
    ]


def _idle(
    compiled: CompiledOrder,
    durations: Durations,
    lines: list[tuple[int, int]],
    step_s: float,
    busy: FloatArray,
) -> dict[str, FloatArray]:
    """Idle seconds of each line by cause."""

    def again(changed: Durations) -> float:
        return float(timing.step_s(*kernel_args(compiled, changed), compiled.position, *scratch(compiled, changed)))

    prompt = replace(durations, data_ready=np.zeros_like(durations.data_ready))
    silent = replace(
        prompt,
        transfer=np.zeros_like(durations.transfer),
        floor=np.zeros_like(durations.floor),
        reduce_s=0.0,
        reduce_tail_s=None,
    )
    prompt_s = again(prompt)
    silent_s = again(silent)
    equal = replace(silent, seconds=_equal_work(compiled, durations), optimizer_s=0.0)
    work = np.zeros(compiled.num_ranks)
    np.add.at(work, compiled.stage_rank[compiled.stage], equal.seconds[compiled.kind, compiled.stage, 0, 0])
    bubble = max(0.0, again(equal) - work.max())
    left = np.maximum(silent_s - busy, 0.0)
    fill_drain = np.minimum(left, bubble)
    found = {
        "data": np.full(len(lines), max(0.0, step_s - prompt_s)),
        "communication": np.full(len(lines), max(0.0, prompt_s - silent_s)),
        "fill_drain": fill_drain,
        "imbalance": left - fill_drain,
    }
    assert set(found) == set(CAUSES)
    return found


def _equal_work(compiled: CompiledOrder, durations: Durations) -> FloatArray:
    """Seconds with which every rank works as long as the mean rank, and all microbatches alike."""
    mean = np.zeros(4)
    for kind in range(4):
        chosen = compiled.kind == kind
        if chosen.any():
            stages = compiled.stage[chosen]
            places = compiled.position[compiled.place[chosen]]
            total = durations.seconds[kind, stages, :, places].sum()
            mean[kind] = total / max(1, durations.num_replicas[stages].sum())
    work = np.zeros(compiled.num_ranks)
    np.add.at(work, compiled.stage_rank[compiled.stage], mean[compiled.kind])
    scale = np.where(work > 0, work.mean() / np.where(work > 0, work, 1.0), 0.0)
    seconds = np.empty_like(durations.seconds)
    seconds[:] = mean[:, None, None, None] * scale[compiled.stage_rank][None, :, None, None]
    return seconds
