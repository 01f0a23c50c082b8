"""One trace format for simulated and for real steps, so that both open side by side.

In: timelines of a simulation, or recorded steps. Out: `TraceEvent`s; as Chrome trace JSON, which Perfetto
(ui.perfetto.dev) and chrome://tracing open.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_dflop.plan.actions import Kind
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.recorded import RecordedStep
from hf_dflop.plan.simulation import Simulation, line_label
from hf_dflop.plan.step import rank_of_line

__all__ = ["TraceEvent", "chrome_trace", "recorded_events", "save_chrome_trace", "simulated_events"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceEvent:
    """Something that a rank did."""

    source: str
    """"simulated" or "recorded"."""
    rank: int
    lane: str
    """What the rank runs, in words."""
    name: str
    """An action such as `2F0`, or what else was done."""
    category: str
    """"vision forward", "llm backward", ..., "microbatch" (forward and backward together), "wait" (for an action's
    input), "send", "data", "reduce", "optimizer"."""
    step: int
    start_s: float
    """From the begin of the first step."""
    duration_s: float


_VERBS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward input",
    Kind.BACKWARD_WEIGHT: "backward weight",
}


def action_category(plan: Plan, stage: int, kind: Kind) -> str:
    """Category of an action's event."""
    return f"{'vision' if stage < plan.vision.num_stages else 'llm'} {_VERBS[kind]}"


def simulated_events(simulation: Simulation, *, max_steps: int | None = None) -> list[TraceEvent]:
    """Events of a simulation's steps, one step after the other."""
    plan = simulation.plan
    lanes = {line: (rank_of_line(plan, *line), line_label(plan, *line)) for line in simulation.timelines[0].lines}
    events, begin = [], 0.0
    for step, timeline in enumerate(simulation.timelines[:max_steps]):
        for timed in timeline.actions:
            rank, lane = lanes[timed.rank, timed.replica]
            events.append(
                TraceEvent(
                    source="simulated",
                    rank=rank,
                    lane=lane,
                    name=str(timed.action),
                    category=action_category(plan, timed.action.stage, timed.action.kind),
                    step=step,
                    start_s=begin + timed.start_s,
                    duration_s=timed.end_s - timed.start_s,
                )
            )
        last = {(timed.rank, timed.replica): timed.end_s for timed in timeline.actions}
        for i, line in enumerate(timeline.lines):
            rank, lane = lanes[line]
            reduced, end = float(timeline.reduced_s[i]), float(timeline.end_s[i])
            for name, start, stop in (("reduce and wait", last[line], reduced), ("optimizer", reduced, end)):
                if stop > start:
                    events.append(
                        TraceEvent(
                            source="simulated",
                            rank=rank,
                            lane=lane,
                            name=name,
                            category=name.split()[0],
                            step=step,
                            start_s=begin + start,
                            duration_s=stop - start,
                        )
                    )
        begin += timeline.step_s
    return events


def recorded_events(steps: Sequence[RecordedStep], plan: Plan | None = None) -> list[TraceEvent]:
    """Events of recorded steps, from the begin of the first on; `plan` tells encoder from LLM."""
    events = []
    zero = min((rank.begin_s - rank.data_s for step in steps for rank in step.ranks), default=0.0)
    for step in steps:
        for rank in step.ranks:
            spans = [("data", "data", rank.begin_s - rank.data_s, rank.begin_s)]
            for action, start, end in rank.actions:
                category = action_category(plan, action.stage, action.kind) if plan else _VERBS[action.kind]
                spans.append((str(action), category, start, end))
            spans += [(f"wait for {action}", "wait", start, end) for action, start, end in rank.waits]
            spans += [(f"send {action}", "send", start, end) for action, start, end in rank.sends]
            if not rank.actions:
                edges = [rank.begin_s, *rank.slot_end_s]
                spans += [
                    (f"microbatch {i}", "microbatch", start, end) for i, (start, end) in enumerate(pairwise(edges))
                ]
            after = max([rank.begin_s, *rank.slot_end_s, *(end for _, _, end in rank.actions)])
            if rank.sync_end_s == rank.sync_end_s:  # not NaN
                summed = [("sum gradients", "reduce", *rank.sum_s)] if rank.sum_s is not None else []
                after = max([after, *(end for _, _, _, end in summed)])
                spans += [
                    *summed,
                    ("reduce and wait", "reduce", after, rank.sync_end_s),
                    ("optimizer", "optimizer", rank.sync_end_s, rank.end_s),
                ]
            events += [
                TraceEvent(
                    source="recorded",
                    rank=rank.rank,
                    lane="",
                    name=name,
                    category=category,
                    step=step.step,
                    start_s=start - zero,
                    duration_s=max(0.0, end - start),
                )
                for name, category, start, end in spans
            ]
    return events


def chrome_trace(events: Iterable[TraceEvent]) -> dict[str, Any]:
    """Chrome trace JSON: a process for each source and rank, times in microseconds."""
    written: list[dict[str, Any]] = []
    processes: dict[tuple[int, str], int] = {}
    for event in events:
        key = (event.rank, event.source)
        if key not in processes:
            processes[key] = pid = len(processes) + 1
            name = f"{event.source} rank {event.rank}" + (f" ({event.lane})" if event.lane else "")
            order = 2 * event.rank + (event.source == "recorded")
            written += [
                {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}},
                {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": order}},
            ]
        written.append(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.category,
                "pid": processes[key],
                "tid": 0,
                "ts": round(event.start_s * 1e6, 3),
                "dur": round(event.duration_s * 1e6, 3),
                "args": {"step": event.step, "kind": event.category},
            }
        )
    return {"traceEvents": written, "displayTimeUnit": "ms"}


def save_chrome_trace(events: Iterable[TraceEvent], path: str | Path) -> None:
    """Write `chrome_trace(events)` to `path`."""
    Path(path).write_text(json.dumps(chrome_trace(events)) + "\n", encoding="utf-8")
