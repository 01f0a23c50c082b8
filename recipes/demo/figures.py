"""The report's figures, with plotly."""

import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hf_dflop.cost import CostModel
from hf_dflop.shapes import Shapes
from recipes.demo.results import ArmSummary, Runs

__all__ = ["cost_of_data", "idle_and_throughput", "loss_curves", "prediction", "timeline"]

INK, GRID = "#1f2933", "#e4e7eb"
COLORS = {
    "stock": "#829ab1",
    "balanced": "#0b7a75",
    "packed": "#063f3c",
    "group_by_length": "#d9a441",
    "batch_rebalance": "#7b5ea7",
}
BUSY, BUSY_OTHER, IDLE, SYNC, DATA = "#0b7a75", "#5fb3ae", "#e4572e", "#9aa5b1", "#d9e2ec"
NAMES = {"stock": "stock Trainer", "balanced": "hf_dflop", "packed": "hf_dflop, packed"}


def _style(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height,
        template="simple_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 70, "r": 20, "t": 40, "b": 90},
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
            "x": 0.5,
            "xanchor": "center",
        },
        hoverlabel={"font_size": 12},
    )
    figure.update_xaxes(gridcolor=GRID)
    figure.update_yaxes(gridcolor=GRID)
    return figure


def cost_of_data(shapes: Shapes, cost: CostModel) -> go.Figure:
    """Each sample's predicted seconds in the encoder and in the LLM, with both distributions."""
    vision, llm = cost.vision_s(shapes), cost.llm_s(shapes)
    figure = make_subplots(
        rows=2, cols=2, column_widths=[0.8, 0.2], row_heights=[0.22, 0.78], shared_xaxes=True, shared_yaxes=True,
        horizontal_spacing=0.02, vertical_spacing=0.03,
    )  # fmt: skip
    hover = [
        f"sample {i}: {images} images, {tiles} tiles, {tokens} tokens"
        for i, (images, tiles, tokens) in enumerate(
            zip(shapes.num_images, shapes.image_tiles, shapes.llm_tokens, strict=True)
        )
    ]
    figure.add_scatter(
        x=llm, y=vision, mode="markers", text=hover, hovertemplate="%{text}<br>LLM %{x:.2f} s, vision %{y:.2f} s",
        marker={"size": 6, "color": shapes.num_images, "colorscale": "Viridis", "opacity": 0.65,
                "colorbar": {"title": "images", "len": 0.6, "y": 0.4}},
        row=2, col=1, showlegend=False,
    )  # fmt: skip
    bins = {"nbinsx": 60, "marker_color": COLORS["stock"], "showlegend": False, "hoverinfo": "skip"}
    figure.add_histogram(x=llm, row=1, col=1, **bins)
    figure.add_histogram(y=vision, row=2, col=2, nbinsy=60, **{k: v for k, v in bins.items() if k != "nbinsx"})
    figure.update_xaxes(title_text="LLM seconds per sample (forward + backward)", row=2, col=1)
    figure.update_yaxes(title_text="vision seconds per sample", row=2, col=1)
    return _style(figure, 460)


def timeline(runs: Runs, steps: list[int], shapes: Shapes) -> go.Figure:
    """What each rank did in `steps`: stock, balanced, and packed as well; the steps hold the same samples."""
    arms = ["stock", "balanced", "packed"]
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.11, subplot_titles=[NAMES[arm] for arm in arms]
    )
    seen: set[str] = set()
    for row, arm in enumerate(arms, start=1):
        ranks = runs[arm][0]["ranks"]
        origin = min(records[steps[0]]["begin_s"] for records in ranks)
        slowest = [
            min(r[step]["sync_end_s"] - r[step]["slot_end_s"][-1] for r in ranks) for step in range(len(ranks[0]))
        ]
        for rank, records in enumerate(ranks):
            for step in steps:
                for kind, color, begin, end, text in _segments(records[step], slowest[step], shapes):
                    figure.add_bar(
                        base=[begin - origin], x=[end - begin], y=[f"rank {rank}"], orientation="h",
                        marker={"color": color, "line": {"color": "white", "width": 1}}, width=0.62, name=kind,
                        legendgroup=kind, showlegend=kind not in seen,
                        hovertemplate=f"step {step + 1}, {text}<br>{end - begin:.2f} s<extra></extra>",
                        row=row, col=1,
                    )  # fmt: skip
                    seen.add(kind)
        figure.update_yaxes(autorange="reversed", row=row, col=1)
        for step in steps:
            figure.add_vline(
                x=max(r[step]["end_s"] for r in ranks) - origin, line={"color": INK, "width": 1, "dash": "dot"},
                row=row, col=1,
            )  # fmt: skip
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title_text="seconds since the first of these steps began", row=3, col=1)
    return _style(figure, 560)


def _segments(record: dict[str, Any], sync_s: float, shapes: Shapes) -> list[tuple[str, str, float, float, str]]:
    begin = record["begin_s"]
    segments = []
    if record["data_s"] > 0:
        segments.append(("load data", DATA, begin - record["data_s"], begin, "load data"))
    for slot, end in enumerate(record["slot_end_s"]):
        color = BUSY_OTHER if slot % 2 else BUSY
        samples = record["samples"][slot] if "samples" in record else []
        picked = shapes.select(samples)
        text = (
            f"microbatch {slot + 1}: samples {samples}<br>{int(picked.image_tiles.sum())} tiles, "
            f"{picked.llm_tokens.tolist()} tokens"
        )
        segments.append(("compute", color, begin, end, text))
        begin = end
    waited = record["sync_end_s"] - begin - sync_s
    segments.append(("wait for the other rank", IDLE, begin, begin + waited, "waiting"))
    segments.append(("reduce, clip, update", SYNC, begin + waited, record["end_s"], "reduce, clip, update"))
    return segments


def idle_and_throughput(summaries: list[ArmSummary]) -> go.Figure:
    """Waiting and throughput of each sampler, one point per round."""
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.14,
        subplot_titles=["share of the step that ranks wait", "samples per second ÷ stock"],
    )  # fmt: skip
    for column, field in ((1, "idle_fraction"), (2, "ratio_to_stock")):
        for summary in summaries:
            values = getattr(summary, field)
            # Narrow columns: a long name goes on in a second line, at its last space or underscore.
            name = re.sub(r"^(.{5,}[ _])(?=[^ _]+$)", r"\1<br>", NAMES.get(summary.arm, summary.arm))
            figure.add_bar(
                x=[name], y=[float(np.median(values))], marker_color=COLORS[summary.arm], opacity=0.55, width=0.6,
                showlegend=False, row=1, col=column, hovertemplate="median %{y:.3f}<extra></extra>",
            )  # fmt: skip
            figure.add_scatter(
                x=[name] * len(values), y=values, mode="markers", showlegend=False, row=1, col=column,
                marker={"color": COLORS[summary.arm], "size": 9, "line": {"color": "white", "width": 1}},
                hovertemplate="a round: %{y:.3f}<extra></extra>",
            )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    figure.update_xaxes(tickangle=0, tickfont={"size": 11})
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=2)
    return _style(figure, 360)


def loss_curves(runs: Runs) -> go.Figure:
    """Training loss of the stock, balanced and packed runs, drawn over each other, and how far they differ."""
    figure = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.14,
        subplot_titles=["training loss", "difference from the stock loss"],
    )  # fmt: skip
    stock = runs["stock"][0]["losses"]
    steps = list(range(1, len(stock) + 1))
    figure.add_scatter(
        x=steps, y=stock, name=NAMES["stock"], line={"color": COLORS["stock"], "width": 7}, opacity=0.6, row=1, col=1
    )
    for arm, dash in (("balanced", "solid"), ("packed", "dot")):
        losses = runs[arm][0]["losses"]
        line = {"color": COLORS[arm], "width": 2, "dash": dash}
        figure.add_scatter(x=steps, y=losses, name=NAMES[arm], line=line, row=1, col=1)
        difference = np.abs(np.subtract(losses, stock))
        figure.add_scatter(x=steps, y=difference, line=line, showlegend=False, row=1, col=2)
    figure.update_yaxes(tickformat=".0e", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title_text="optimizer step", dtick=1)
    return _style(figure, 340)


def prediction(runs: Runs) -> go.Figure:
    """Predicted and measured seconds of every microbatch of the runs that were planned."""
    figure = go.Figure()
    largest = 0.0
    for arm in ("stock", "balanced", "packed"):
        predicted, measured = microbatch_seconds(runs[arm])
        largest = max(largest, *predicted, *measured)
        figure.add_scatter(
            x=predicted, y=measured, mode="markers", name=NAMES[arm],
            marker={"color": COLORS[arm], "size": 6, "opacity": 0.6},
            hovertemplate="predicted %{x:.2f} s, measured %{y:.2f} s<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[0, largest], y=[0, largest], mode="lines", line={"color": INK, "dash": "dot", "width": 1}, name="equal"
    )
    figure.update_xaxes(title_text="predicted seconds of a microbatch")
    figure.update_yaxes(title_text="measured seconds")
    return _style(figure, 380)


def microbatch_seconds(runs: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(predicted, measured) seconds of every microbatch of the runs."""
    predicted, measured = [], []
    for run in runs:
        for records in run["ranks"]:
            for record in records:
                if "slot_predicted_s" in record:
                    edges = [record["begin_s"], *record["slot_end_s"]]
                    measured += np.diff(edges).tolist()
                    predicted += record["slot_predicted_s"]
    return predicted, measured
