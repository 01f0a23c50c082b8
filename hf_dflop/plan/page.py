"""A page on which a simulated step can be looked at, alone or beside a recorded one: one file, nothing to install.

In: a `Simulation`, optionally recorded steps and their `Comparison`. Out: HTML.

Assumptions: at most `MAX_STEPS` steps of at most `MAX_LINES` ranks are drawn; more would be too large to look at.
"""

import json
from collections.abc import Sequence
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
        simulation (`Simulation`): its first steps are drawn.
        recorded (`Sequence[RecordedStep]`): steps of a run, drawn below the simulated ones: k-th beside k-th.
        comparison (`Comparison`, *optional*): listed below.
        title (`str`): heading.
    """
    events = [
        e for e in simulated_events(simulation, max_steps=MAX_STEPS) if e.rank < MAX_LINES * simulation.plan.llm.tp
    ]
    ranks = simulation.to_dict()["ranks"][:MAX_LINES]
    for rank in ranks:
        lane = line_label(simulation.plan, rank["pipeline_rank"], rank["replica"])
        rank["label"] = f"rank {rank['rank']}: {lane}"
    rows: list[str] = []
    drawn = _placed(events, rows, {})
    names = {step: f"{step}: {simulation.step_s[step]:.4g} s" for step in {event.step for event in events}}
    if recorded:
        numbers = {step.step: i for i, step in enumerate(recorded[:MAX_STEPS])}
        drawn += _placed(recorded_events(recorded[:MAX_STEPS], simulation.plan), rows, numbers)
        for step in recorded[:MAX_STEPS]:
            number = numbers[step.step]
            names[number] = f"{names.get(number, number)}, recorded step {step.step}: {step.step_s:.4g} s"
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


def _placed(events: Sequence[TraceEvent], rows: list[str], numbers: dict[int, int]) -> list[dict[str, Any]]:
    """Events with their row, from the begin of their step."""
    begins: dict[int, float] = {}
    for event in events:
        begins[event.step] = min(begins.get(event.step, event.start_s), event.start_s)
    drawn = []
    found: dict[tuple[str, int], int] = {}
    for source, rank, lane in sorted({(e.source, e.rank, e.lane) for e in events}, key=lambda key: key[:2]):
        found[source, rank] = len(rows)
        rows.append(f"rank {rank}: {lane}" if lane else f"rank {rank}, {source}")
    for event in events:
        drawn.append(
            {
                "row": found[event.source, event.rank],
                "name": event.name,
                "category": event.category,
                "step": numbers.get(event.step, event.step),
                "start": round(event.start_s - begins[event.step], 9),
                "duration": round(event.duration_s, 9),
            }
        )
    return drawn
