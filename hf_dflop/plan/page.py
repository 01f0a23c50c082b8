"""A page on which a simulated step can be looked at, alone or beside a recorded one: one file, nothing to install.

In: a `Simulation`, optionally recorded steps and their `Comparison`. Out: HTML.

Assumptions: at most `MAX_STEPS` steps of at most `MAX_LINES` ranks are drawn; more would be too large to look at.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_dflop.plan.compare_run import Comparison
from hf_dflop.plan.recorded import RecordedStep
from hf_dflop.plan.simulation import Simulation, line_label
from hf_dflop.plan.trace_events import TraceEvent, recorded_events, simulated_events

__all__ = ["timeline_page"]

MAX_STEPS = 8
MAX_LINES = 64


def timeline_page(
    simulation: Simulation,
    *,
    recorded: Sequence[RecordedStep] = (),
    comparison: Comparison | None = None,
    title: str = "Simulated steps",
) -> str:
    """The page.

    Args:
        simulation (`Simulation`): its first steps are drawn; beside recorded ones, `Comparison.replayed`.
        recorded (`Sequence[RecordedStep]`): steps of a run, the k-th drawn below the k-th simulated one.
        comparison (`Comparison`, *optional*): its differences are listed below.
        title (`str`): heading.
    """
    events = [
        e for e in simulated_events(simulation, max_steps=MAX_STEPS) if e.rank < MAX_LINES * simulation.plan.llm.tp
    ]
    ranks = simulation.to_dict()["ranks"][:MAX_LINES]
    for rank in ranks:
        lane = line_label(simulation.plan, rank["pipeline_rank"], rank["replica"])
        rank["label"] = f"rank {rank['rank']}: {lane}"
    names = {step: f"{step}: {simulation.step_s[step]:.4g} s" for step in {event.step for event in events}}
    shown = recorded[:MAX_STEPS]
    for number, step in enumerate(shown):
        names[number] = f"{step.step}: simulated {simulation.step_s[number]:.4g} s, recorded {step.step_s:.4g} s"
    events += [
        replace(event, step=[step.step for step in shown].index(event.step))
        for event in recorded_events(shown, simulation.plan)
    ]
    rows, drawn = _placed(events, both=bool(recorded))
    plan = simulation.plan
    low, high = simulation.interval_s
    data: dict[str, Any] = {
        "title": title,
        "lead": (
            f"{plan.placement} on {plan.num_ranks} ranks, {simulation.num_samples} samples and "
            f"{plan.num_microbatches} microbatches per replica a step, schedule {plan.schedule}, microbatches "
            f"{'balanced' if plan.balance else 'as dealt'}. Mean step {simulation.mean_s:.4g} s (95 % confidence "
            f"{low:.4g} to {high:.4g}) over {len(simulation.timelines)} steps; ranks wait "
            f"{simulation.idle_fraction:.1%} of it."
        ),
        "rows": rows,
        "events": drawn,
        "stepNames": names,
        "ranks": ranks,
        "stepSeconds": simulation.mean_s,
        "differences": [] if comparison is None else comparison.to_dict()["kinds"],
    }
    template = Path(__file__).with_name("timeline.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps(data).replace("</", "<\\/"))


def _placed(events: Sequence[TraceEvent], *, both: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the rows, a rank's simulated one above its recorded one; and events with their row."""
    begins: dict[tuple[str, int], float] = {}
    for event in events:
        key = event.source, event.step
        begins[key] = min(begins.get(key, event.start_s), event.start_s)
    lanes = sorted({(event.rank, event.source != "simulated", event.lane) for event in events})
    rows = []
    for rank, is_recorded, lane in lanes:
        label = f"rank {rank}: {lane}" if lane else f"rank {rank}"
        rows.append(f"{label}, {'recorded' if is_recorded else 'simulated'}" if both else label)
    place = {(rank, is_recorded): row for row, (rank, is_recorded, _) in enumerate(lanes)}
    drawn = [
        {
            "row": place[event.rank, event.source != "simulated"],
            "name": event.name,
            "category": event.category,
            "step": event.step,
            "start": round(event.start_s - begins[event.source, event.step], 9),
            "duration": round(event.duration_s, 9),
        }
        for event in events
    ]
    return rows, drawn
