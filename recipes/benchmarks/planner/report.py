"""The planner topic on the page."""

from statistics import median

from recipes.benchmarks.common.figures import Figure
from recipes.benchmarks.common.results import Result
from recipes.benchmarks.common.tables import table
from recipes.benchmarks.planner.__main__ import LIMITS

__all__ = ["figures", "section"]


def section(result: Result) -> str:
    """CPU seconds and memory by model and GPUs, beside the limits."""
    rows = []
    cells = {(row["model"], row["num_gpus"]) for row in result.of_kind("planning")}
    for model, num_gpus in sorted(cells, key=lambda cell: (cell[1], cell[0])):
        own = [r for r in result.of_kind("planning") if (r["model"], r["num_gpus"]) == (model, num_gpus)]
        first = own[0]
        limit = LIMITS.get(num_gpus)
        rows.append(
            [
                f"{num_gpus:,}",
                model,
                f"{median(row['cpu_s'] for row in own):.3g} s",
                "–" if limit is None else f"{limit:g} s",
                f"{max(row['peak_bytes'] for row in own) / 2**30:.2f} GiB",
                f"{first['num_layouts']:,}",
                f"{first['num_layouts'] - first['num_bounded']:,}",
                first["winner"],
            ]
        )
    header = ["GPUs", "model", "CPU", "aim", "memory", "layouts", "not ruled out by bounds", "winner"]
    late = [row for row in rows if row[3] != "–" and float(row[2][:-2]) > float(row[3][:-2])]
    words = (
        f"In {len(late)} of {len(rows)} cases the planner is slower than it should be on this machine."
        if late
        else "All are within the aim."
    )
    loads = [row["load_s"] for row in result.of_kind("planning")]
    return (
        f"{table(header, rows)}\n\n{words} Loading the compiled functions from the cache, and a planning for 8 GPUs, "
        f"come before that: {min(loads):.2g} to {max(loads):.2g} s."
    )


def figures(result: Result) -> list[Figure]:
    """None: the table says it."""
    return []
