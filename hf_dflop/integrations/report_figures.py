"""The figures of the straggler page, with plotly: a step's timeline, seconds per rank, waiting over the run, accuracy.

Inputs: a loaded trace and its report. Clocks of machines need not agree: the ranks of a step are lined up where they
leave the gradient reduction together.
"""

from typing import Any

import numpy as np

from hf_dflop.integrations.report import SlowMicrobatch, StragglerReport, microbatches_of, some_samples
from hf_dflop.integrations.trace import Trace
from hf_dflop.profile.figures import style

__all__ = ["accuracy", "pick_ranks", "pick_steps", "seconds_per_rank", "timeline", "waiting_over_steps"]

COLORS = {
    "loading data": "#b8c4d0",
    "computing": "#0b7a75",
    "waiting for the slowest rank": "#e4572e",
    "reducing gradients": "#d9a441",
    "optimizer": "#7b5ea7",
}
_OTHER_SHADE = "#5fb3ae"
_MAX_RANKS = 16
_MAX_POINTS = 4000
_NUM_STEPS = 3


def pick_ranks(report: StragglerReport) -> list[int]:
    """All ranks; of many, the busiest and the least busy ones."""
    order = [rank.rank for rank in sorted(report.ranks, key=lambda rank: (-rank.busy_s, rank.rank))]
    if len(order) > _MAX_RANKS:
        order = order[: _MAX_RANKS // 2] + order[-_MAX_RANKS // 2 :]
    return sorted(order)


def idle_by_step(trace: Trace) -> dict[int, float]:
    """Share of every step that the mean rank waited; NaN where it was not measured."""
    shares = {}
    for step in trace.steps:
        records = [records[step] for records in trace.ranks.values()]
        sync = np.array([r["sync_end_s"] - (r["slot_end_s"] or [np.nan])[-1] for r in records])
        whole = np.mean([r["end_s"] - r["begin_s"] + r["data_s"] for r in records])
        shares[step] = float((sync - sync.min()).mean() / whole) if whole > 0 else float("nan")
    return shares


def pick_steps(trace: Trace) -> dict[str, list[int]]:
    """Steps to look at: around the one with the most waiting, and around a usual one, after warm-up."""
    shares = {step: share for step, share in idle_by_step(trace).items() if share == share}
    steps = [step for step in trace.steps if step in shares]
    steps = steps[1:] if len(steps) > _NUM_STEPS else steps
    if not steps:
        return {}
    order = sorted(steps, key=lambda step: (shares[step], step))
    picked = {"the most waiting": order[-1], "usual waiting": order[len(order) // 2]}
    found: dict[str, list[int]] = {}
    for name, step in picked.items():
        position = min(max(steps.index(step) - 1, 0), max(len(steps) - _NUM_STEPS, 0))
        window = steps[position : position + _NUM_STEPS]
        if window not in found.values():
            found[name] = window
    return found


def timeline(trace: Trace, ranks: list[int], steps: list[int]) -> Any:
    """What each rank did in these steps."""
    import plotly.graph_objects as go

    kinds: dict[str, dict[str, list[Any]]] = {
        kind: {"base": [], "x": [], "y": [], "text": [], "color": []} for kind in COLORS
    }

    def add(kind: str, rank: int, begin: float, end: float, text: str, color: str | None = None) -> None:
        if end > begin:
            bars = kinds[kind]
            bars["base"].append(begin)
            bars["x"].append(end - begin)
            bars["y"].append(f"rank {rank}")
            bars["text"].append(text)
            bars["color"].append(color or COLORS[kind])

    first = min(trace.ranks)
    origin = trace.ranks[first][steps[0]]["begin_s"] - trace.ranks[first][steps[0]]["data_s"]
    edges = []
    for step in steps:
        together = trace.ranks[first][step]["sync_end_s"] - origin
        fastest_sync = min(r[step]["sync_end_s"] - r[step]["slot_end_s"][-1] for r in trace.ranks.values())
        for rank in ranks:
            record = trace.ranks[rank][step]
            shift = together - record["sync_end_s"]
            begin = record["begin_s"] + shift
            add("loading data", rank, begin - record["data_s"], begin, f"step {step}: loading data")
            found = microbatches_of(record)
            for slot, moment in enumerate(record["slot_end_s"]):
                end = moment + shift
                text = f"step {step}, microbatch {slot}"
                if found:
                    text += f"<br>samples {some_samples(found[slot].samples)}"
                    text += f"<br>mostly {found[slot].module}" if found[slot].module else ""
                add("computing", rank, begin, end, text, _OTHER_SHADE if slot % 2 else None)
                begin = end
            add("waiting for the slowest rank", rank, begin, together - fastest_sync, f"step {step}: waiting")
            add("reducing gradients", rank, together - fastest_sync, together, f"step {step}: reducing gradients")
            add("optimizer", rank, together, record["end_s"] + shift, f"step {step}: optimizer")
        edges.append(max(trace.ranks[r][step]["end_s"] - trace.ranks[r][step]["sync_end_s"] for r in ranks) + together)
    figure = go.Figure()
    for kind, bars in kinds.items():
        if bars["x"]:
            color = bars.pop("color")
            figure.add_bar(
                **bars, name=kind, orientation="h", width=0.66, textposition="none",
                marker={"color": color, "line": {"color": "white", "width": 1}},
                hovertemplate="%{y}, %{text}<br>%{x:.3f} s<extra></extra>",
            )  # fmt: skip
    for step, edge in zip(steps, edges, strict=True):
        figure.add_vline(x=edge, line={"color": "#52606d", "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=edge, y=1, yref="paper", yanchor="bottom", xanchor="right", text=f"step {step} ends", showarrow=False,
            font={"size": 11, "color": "#52606d"},
        )  # fmt: skip
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[f"rank {r}" for r in ranks])
    figure.update_xaxes(title_text="seconds")
    return _legend_below(style(figure, 170 + 34 * len(ranks)))


def seconds_per_rank(report: StragglerReport, ranks: list[int]) -> Any:
    """Where the seconds of a mean step go on each rank."""
    import plotly.graph_objects as go

    shown = [rank for rank in report.ranks if rank.rank in ranks]
    parts = {
        "loading data": [rank.data_s for rank in shown],
        "computing": [rank.busy_s for rank in shown],
        "waiting for the slowest rank": [rank.idle_s for rank in shown],
        "reducing gradients": [report.sync_s] * len(shown),
        "optimizer": [report.optimizer_s] * len(shown),
    }
    figure = go.Figure()
    for kind, values in parts.items():
        figure.add_bar(
            x=values, y=[f"rank {rank.rank}" for rank in shown], name=kind, orientation="h", width=0.66,
            marker_color=COLORS[kind], hovertemplate="%{y}, " + kind + ": %{x:.3f} s<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="seconds of a mean step")
    return _legend_below(style(figure, 170 + 34 * len(shown)))


def waiting_over_steps(trace: Trace) -> Any:
    """The waiting share of every step, its running median, and where corrected costs came into force."""
    import plotly.graph_objects as go

    shares = idle_by_step(trace)
    steps = np.array(list(shares))
    values = np.array(list(shares.values()))
    half = max(2, len(steps) // 40)
    smooth = [float(np.nanmedian(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
    figure = go.Figure()
    figure.add_scatter(
        x=steps, y=values, mode="markers", name="a step", marker={"size": 5, "color": COLORS["reducing gradients"]},
        hovertemplate="step %{x}: %{y:.1%}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=steps, y=smooth, mode="lines", name="running median", line={"color": COLORS["computing"], "width": 2},
        hoverinfo="skip",
    )  # fmt: skip
    records = trace.ranks[min(trace.ranks)]
    version = 0
    for step in steps.tolist():
        now = int(records[step].get("cost_version", 0))
        if now != version:
            version = now
            figure.add_vline(
                x=step, line={"color": "#52606d", "dash": "dot", "width": 1.5},
                annotation_text=f"costs, version {now}",
                annotation_position="top right",
                annotation_font={"size": 11, "color": "#52606d"},
            )  # fmt: skip
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(title_text="share of the step", tickformat=".0%", rangemode="tozero")
    return style(figure, 300)


def accuracy(trace: Trace, report: StragglerReport) -> Any | None:
    """Measured over predicted seconds of every microbatch; None without predictions."""
    import plotly.graph_objects as go

    steps = set(trace.steps[1:] or trace.steps)
    found = [
        microbatch
        for rank in trace.ranks.values()
        for step, record in rank.items()
        if step in steps
        for microbatch in microbatches_of(record)
    ]
    if not found:
        return None
    scales: dict[int, float] = {}
    for version in {microbatch.cost_version for microbatch in found}:
        scales[version] = float(np.median([m.ratio for m in found if m.cost_version == version]))
    found = found[:: max(1, -(-len(found) // _MAX_POINTS))]
    slow = {rank.rank for rank in report.slow_ranks}
    figure = go.Figure()
    for name, color, own in (
        ("microbatch", COLORS["computing"], [m for m in found if m.rank not in slow]),
        ("microbatch of a slow rank", COLORS["waiting for the slowest rank"], [m for m in found if m.rank in slow]),
    ):
        if own:
            figure.add_scattergl(
                x=[m.predicted_s * scales[m.cost_version] for m in own], y=[m.measured_s for m in own], name=name,
                mode="markers", marker={"size": 5, "opacity": 0.6, "color": color},
                text=[_named(m) for m in own],
                hovertemplate="%{text}<br>predicted %{x:.3f} s, measured %{y:.3f} s<extra></extra>",
            )  # fmt: skip
    largest = max(m.predicted_s * scales[m.cost_version] for m in found)
    figure.add_scatter(
        x=[0, largest], y=[0, largest], mode="lines", name="as predicted", hoverinfo="skip",
        line={"color": "#9aa5b1", "dash": "dot"},
    )  # fmt: skip
    figure.update_xaxes(title_text="predicted seconds", rangemode="tozero")
    figure.update_yaxes(title_text="measured seconds", rangemode="tozero")
    return style(figure, 380)


def _legend_below(figure: Any) -> Any:
    below = {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0.5, "xanchor": "center"}
    figure.update_layout(legend={**below, "traceorder": "normal"}, margin={"b": 90})
    return figure


def _named(microbatch: SlowMicrobatch) -> str:
    place = f"step {microbatch.step}, rank {microbatch.rank}, microbatch {microbatch.slot}"
    return f"{place}<br>samples {some_samples(microbatch.samples)}"
