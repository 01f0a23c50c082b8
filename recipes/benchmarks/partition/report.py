"""The partition topic on the page."""

from statistics import mean
from typing import Any

from recipes.benchmarks.common.figures import COLORS, Figure
from recipes.benchmarks.common.results import Result
from recipes.benchmarks.common.tables import table
from recipes.benchmarks.partition.solvers import SOLVERS

__all__ = ["figures", "section"]

_OURS = "hf_dflop, both costs"


def _cells(result: Result, ratio: float) -> dict[tuple[str, int, int], tuple[float, float, int]]:
    """(solver, samples, buckets) → mean load ÷ bound, mean seconds, number of batches."""
    found: dict[tuple[str, int, int], list[Any]] = {}
    for row in result.of_kind("partition"):
        if row["work_ratio"] == ratio:
            found.setdefault((row["solver"], row["num_samples"], row["num_buckets"]), []).append(row)
    return {
        key: (mean(r["load_to_bound"] for r in rows), mean(r["seconds"] for r in rows), len(rows))
        for key, rows in found.items()
    }


def _sizes(result: Result) -> list[tuple[int, int]]:
    return sorted({(row["num_samples"], row["num_buckets"]) for row in result.of_kind("partition")})


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.1f} s"


def section(result: Result) -> str:
    """Two tables, one for each work ratio, and what they say."""
    sizes = _sizes(result)
    parts = []
    for ratio in sorted({row["work_ratio"] for row in result.of_kind("partition")}, reverse=True):
        cells = _cells(result, ratio)
        rows = []
        for name in [solver.name for solver in SOLVERS]:
            if not any(key[0] == name for key in cells):
                continue
            shown = []
            for size in sizes:
                cell = cells.get((name, *size))
                shown.append(f"{cell[0]:.3f}, {_seconds(cell[1])}" if cell else "–")
            rows.append([f"**{name}**" if name == _OURS else name, *shown])
        header = ["largest load ÷ bound, seconds", *(f"{n} in {m}" for n, m in sizes)]
        parts.append(f"Encoder work ÷ LLM work = {ratio}:\n\n{table(header, rows)}")
    lost = _lost(result)
    parts.append(
        "Ours is the lowest of all in every cell."
        if not lost
        else "Cells in which another is lower than ours: " + "; ".join(lost) + "."
    )
    return "\n\n".join(parts)


def _lost(result: Result) -> list[str]:
    lost = []
    for ratio in sorted({row["work_ratio"] for row in result.of_kind("partition")}, reverse=True):
        cells = _cells(result, ratio)
        for n, m in _sizes(result):
            ours = cells[_OURS, n, m][0]
            better = [
                (value[0], key[0]) for key, value in cells.items() if key[1:] == (n, m) and value[0] < ours - 5e-4
            ]
            if better:
                value, name = min(better)
                lost.append(f"work ratio {ratio}, {n} in {m}: {name} {value:.3f} against {ours:.3f}")
    return lost


def figures(result: Result) -> list[Figure]:
    """Quality against the number of samples."""
    ratio = max(row["work_ratio"] for row in result.of_kind("partition"))
    cells = _cells(result, ratio)
    sizes = _sizes(result)
    lines = {}
    for name in [solver.name for solver in SOLVERS]:
        points = [[n, cells[name, n, m][0], cells[name, n, m][1]] for n, m in sizes if (name, n, m) in cells]
        if points:
            lines[name] = points
    return [
        Figure(
            name="partition",
            alt="Largest load over lower bound, and seconds, of each partitioner as the global batch grows",
            data=lines,
            paint=_paint,
            size=(9.0, 3.6),
        )
    ]


def _paint(canvas: Any, data: dict[str, list[list[float]]]) -> None:
    left, right = canvas.subplots(1, 2)
    for number, (name, points) in enumerate(data.items()):
        n, load, seconds = zip(*points, strict=True)
        ours = name == _OURS
        style = {
            "marker": "osD^vPX*<>"[number % 10], "markersize": 4,
            "linewidth": 2.2 if ours else 1.1, "color": COLORS["ours"] if ours else f"C{number}",
            "zorder": 3 if ours else 2, "label": name,
        }  # fmt: skip
        left.plot(n, load, **style)
        right.plot(n, [value * 1e3 for value in seconds], **style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("samples of a global batch")
        axes.grid(alpha=0.25)
    left.set_yscale("log")
    left.set_yticks([1, 1.05, 1.2, 1.5, 2, 2.5], ["1", "1.05", "1.2", "1.5", "2", "2.5"])
    left.minorticks_off()
    left.set_ylabel("largest load ÷ lower bound")
    right.set_yscale("log")
    right.set_ylabel("ms")
    canvas.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
