"""The figures of the report, with plotly: joint distribution, tail, sub-datasets, waiting."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.profile.waiting import WAYS, Waiting
from hf_dflop.shapes import Shapes

__all__ = ["WAY_NAMES", "joint", "style", "subsets", "tail", "waiting"]

INK, GRID = "#1f2933", "#e4e7eb"
COLORS = {"stock": "#829ab1", "group_by_length": "#d9a441", "batch_rebalance": "#7b5ea7", "balanced": "#0b7a75"}
WAY_NAMES = {
    "stock": "stock sampling",
    "group_by_length": "group_by_length",
    "batch_rebalance": "batch_rebalance",
    "balanced": "hf_dflop",
}
_MAX_POINTS = 5000
"""Points drawn at most, so that the page stays small; histograms count all samples."""

Costs = npt.NDArray[np.float64]


def style(figure: Any, height: int) -> Any:
    """The look of all figures of the pages."""
    figure.update_layout(
        height=height,
        template="simple_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 70, "r": 20, "t": 30, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    figure.update_xaxes(gridcolor=GRID)
    figure.update_yaxes(gridcolor=GRID)
    return figure


def joint(shapes: Shapes, vision: Costs, llm: Costs, unit: str, encoder: str) -> Any:
    """Each sample's cost in the encoder and in the LLM, with both distributions."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=2, column_widths=[0.82, 0.18], row_heights=[0.2, 0.8], shared_xaxes=True, shared_yaxes=True,
        horizontal_spacing=0.02, vertical_spacing=0.03,
    )  # fmt: skip
    picked = np.arange(len(shapes))
    if picked.size > _MAX_POINTS:
        heaviest = np.argsort(-(vision + llm), kind="stable")[: _MAX_POINTS // 10]
        others = np.random.default_rng(0).permutation(picked.size)[: _MAX_POINTS - heaviest.size]
        picked = np.union1d(heaviest, others)
    hover = [f"row {i}: {_media(shapes, i)}{shapes.llm_tokens[i]:,} tokens" for i in picked]
    many = bool(shapes.num_images.max() > 1)
    color = {"color": shapes.num_images[picked], "colorscale": "Viridis"} if many else {"color": COLORS["balanced"]}
    bar = {"colorbar": {"title": "images", "len": 0.6, "y": 0.4}} if many else {}
    figure.add_scattergl(
        x=llm[picked], y=vision[picked], mode="markers", text=hover, showlegend=False, row=2, col=1,
        hovertemplate=f"%{{text}}<br>LLM %{{x:.3g}}, {encoder} %{{y:.3g}} {unit}<extra></extra>",
        marker={"size": 5, "opacity": 0.6, **color, **bar},
    )  # fmt: skip
    for row, column, axis, values in ((1, 1, "x", llm), (2, 2, "y", vision)):
        counts, edges = np.histogram(values, bins=60)
        middle, width = (edges[:-1] + edges[1:]) / 2, float(edges[1] - edges[0])
        bars = {"x": middle, "y": counts} if axis == "x" else {"x": counts, "y": middle, "orientation": "h"}
        figure.add_bar(
            **bars, width=width, marker_color=COLORS["stock"], showlegend=False, hoverinfo="skip", row=row, col=column
        )
    figure.update_xaxes(title_text=f"LLM, {unit} per sample", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title_text=f"{encoder}, {unit} per sample", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="samples", row=2, col=2)
    figure.update_yaxes(title_text="samples", row=1, col=1)
    return style(figure, 480)


def _media(shapes: Shapes, i: Any) -> str:
    """What a sample holds, and a comma, for the hover text."""
    parts = []
    if shapes.num_images[i] or not shapes.num_audios[i]:
        parts += [f"{shapes.num_images[i]} images", f"{shapes.image_patches[i]:,} patches"]
    if shapes.num_audios[i]:
        parts += [f"{shapes.num_audios[i]} sounds of {shapes.audio_ms[i] / 1000:,.1f} s"]
    return "".join(f"{part}, " for part in parts)


def tail(vision: Costs, llm: Costs, encoder: str) -> Any:
    """What share of the cost the heaviest samples take."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values, color in ((encoder, vision, "#7b5ea7"), ("LLM", llm, COLORS["balanced"])):
        heaviest = np.sort(values)[::-1].cumsum()
        if heaviest[-1] > 0:
            at = np.unique(np.linspace(0, heaviest.size - 1, 200).astype(int))
            figure.add_scatter(
                x=(at + 1) / heaviest.size, y=heaviest[at] / heaviest[-1], name=name, mode="lines",
                line={"color": color, "width": 2},
            )  # fmt: skip
    figure.add_scatter(
        x=[0, 1], y=[0, 1], name="all samples equal", mode="lines", line={"color": "#9aa5b1", "dash": "dot"}
    )
    figure.update_xaxes(title_text="share of samples, heaviest first", tickformat=".0%")
    figure.update_yaxes(title_text="share of the cost", tickformat=".0%")
    return style(figure, 320)


def subsets(names: Sequence[str], of_samples: Costs, of_cost: Costs) -> Any:
    """Share of samples and share of cost of each sub-dataset."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for label, values, color in (("samples", of_samples, COLORS["stock"]), ("cost", of_cost, COLORS["balanced"])):
        figure.add_bar(
            y=list(names), x=values, orientation="h", name=f"share of {label}", marker_color=color,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return style(figure, 120 + 44 * len(names))


def waiting(results: Sequence[Waiting]) -> Any:
    """Predicted waiting of each way at each number of ranks."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for way in WAYS:
        chosen = [result for result in results if result.way == way]
        figure.add_bar(
            x=[f"{result.num_ranks} ranks" for result in chosen], y=[result.idle_fraction for result in chosen],
            name=WAY_NAMES[way], marker_color=COLORS[way], text=[f"{r.idle_fraction:.1%}" for r in chosen],
            textposition="outside", cliponaxis=False, hovertemplate="%{x}: %{y:.1%} of the step<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(title_text="share of the step spent waiting", tickformat=".0%", rangemode="tozero")
    return style(figure, 340)
