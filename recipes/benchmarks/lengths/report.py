"""The lengths topic on the page."""

from typing import Any

from recipes.benchmarks.common.figures import COLORS, Figure
from recipes.benchmarks.common.results import Result
from recipes.benchmarks.common.tables import spread, table
from recipes.benchmarks.lengths.__main__ import WAYS

__all__ = ["figures", "section"]


_LABELS = {
    "hf_dflop": "hf_dflop",
    "processor": "processor",
    "trainer_pass": "group_by_length's pass",
    "text_only": "text alone (not the true lengths)",
}


def _of(result: Result, rows: str, way: str) -> list[dict[str, Any]]:
    return [row for row in result.of_kind("lengths") if row["rows"] == rows and row["way"] == way]


def _sets(result: Result) -> list[str]:
    return list(dict.fromkeys(row["rows"] for row in result.of_kind("lengths")))


def section(result: Result) -> str:
    """A row for each way, a pair of columns for each set of rows."""
    sets = _sets(result)
    lines = []
    for way, what in WAYS.items():
        cells = []
        for rows in sets:
            own = _of(result, rows, way)
            ours = _of(result, rows, "hf_dflop")
            ratio = [a["ms_per_sample"] / b["ms_per_sample"] for a, b in zip(own, ours, strict=True)]
            right = "yes" if all(row["same_lengths"] for row in own) else "**no**"
            cells += [spread([row["ms_per_sample"] for row in own], "{:.3g}"), spread(ratio, "{:.3g}"), right]
        lines.append([f"**{what}**" if way == "hf_dflop" else what, *cells])
    header = ["way"]
    for rows in sets:
        header += [f"{rows}: ms a sample", "÷ ours", "true lengths"]
    counts = ", ".join(f"{_of(result, rows, 'hf_dflop')[0]['num_rows']} {rows}" for rows in sets)
    faster = [
        f"{WAYS[way].split(':')[0]} on {rows}"
        for rows in sets
        for way in WAYS
        if way != "hf_dflop"
        and all(
            a["ms_per_sample"] < b["ms_per_sample"]
            for a, b in zip(_of(result, rows, way), _of(result, rows, "hf_dflop"), strict=True)
        )
    ]
    said = f"Faster than ours in every round: {'; '.join(faster)}." if faster else "No way is faster than ours."
    return f"{table(header, lines)}\n\nOne process, {counts}; median (smallest–largest) of the rounds. {said}"


def figures(result: Result) -> list[Figure]:
    """Milliseconds a sample, on a log axis."""
    data = {
        rows: {way: [row["ms_per_sample"] for row in _of(result, rows, way)] for way in WAYS} for rows in _sets(result)
    }
    alt = "Milliseconds a sample of each way to learn the lengths, for documents and photos"
    return [Figure(name="lengths", alt=alt, data=data, paint=_paint, size=(8.0, 2.6))]


def _paint(canvas: Any, data: dict[str, dict[str, list[float]]]) -> None:
    panels = canvas.subplots(1, len(data), sharey=True, squeeze=False)[0]
    for axes, (rows, ways) in zip(panels, data.items(), strict=True):
        middles = [sorted(values)[len(values) // 2] for values in ways.values()]
        colors = [COLORS["ours"] if way == "hf_dflop" else COLORS["other"] for way in ways]
        axes.barh(range(len(ways)), middles, color=colors)
        for at, value in enumerate(middles):
            axes.text(value, at, f" {value:.3g}", va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(right=4 * max(middles))
        axes.set_xlabel("ms a sample")
        axes.set_title(rows, fontsize=9)
        axes.set_yticks(range(len(ways)), [_LABELS[way] for way in ways])
    panels[0].invert_yaxis()
