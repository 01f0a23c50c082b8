"""The prediction topic on the page: made from the result of the balancing topic."""

from typing import Any

import numpy as np

from recipes.benchmarks.balancing.settings import MIXES
from recipes.benchmarks.common.figures import COLORS, Figure
from recipes.benchmarks.common.results import Result
from recipes.benchmarks.common.tables import percent, table

__all__ = ["figures", "paint_points", "section"]


def section(result: Result) -> str:
    """Errors of microbatch seconds, and predicted beside measured waiting."""
    rows = []
    for row in result.of_kind("slots"):
        predicted, measured = np.array(row["predicted_measured_s"]).T
        error = np.abs(predicted / measured - 1)
        waits = [run for run in result.of_kind("run") if (run["mix"], run["arm"]) == (row["mix"], row["arm"])]
        known = [run["predicted_idle"] for run in waits if run["predicted_idle"] is not None]
        rows.append(
            [
                f"`{row['mix']}`",
                row["arm"],
                str(len(predicted)),
                f"{100 * np.median(error):.0f} %",
                f"{100 * np.percentile(error, 95):.0f} %",
                f"{measured.sum() / predicted.sum():.2f}",
                percent(known) if known else "–",
                percent([run["waiting"] for run in waits]),
            ]
        )
    header = [
        "mix", "arm", "microbatches", "median error", "95th percentile", "measured ÷ predicted, all",
        "waiting predicted", "waiting measured",
    ]  # fmt: skip
    said = (
        "Seconds of the microbatches of the first round of the balancing topic, whose cost model was fitted once for "
        "each mix to two dozen small microbatches. An error that all microbatches share does not matter to balancing; "
        "ranks wait for what differs between them."
    )
    return f"{table(header, rows)}\n\n{said}"


def figures(result: Result) -> list[Figure]:
    """Measured against predicted seconds of each microbatch."""
    data: dict[str, dict[str, Any]] = {mix: {} for mix in MIXES}
    for row in result.of_kind("slots"):
        data[row["mix"]][row["arm"]] = row["predicted_measured_s"]
    data = {mix: arms for mix, arms in data.items() if arms}
    alt = "Measured against predicted seconds of microbatches, by mix"
    return [Figure(name="prediction", alt=alt, data=data, paint=paint_points, size=(9.0, 3.2))]


def paint_points(canvas: Any, data: dict[str, dict[str, list[list[float]]]]) -> None:
    """Measured against predicted seconds of mix -> arm -> (predicted, measured)."""
    panels = canvas.subplots(1, len(data), squeeze=False)[0]
    colors = {
        "stock": COLORS["light"], "stock+packed": COLORS["other"], "hf_dflop": COLORS["second"],
        "hf_dflop+packed": COLORS["ours"],
    }  # fmt: skip
    for axes, (mix, arms) in zip(panels, data.items(), strict=True):
        most = 0.0
        for arm, points in arms.items():
            predicted, measured = zip(*points, strict=True)
            most = max(most, *predicted, *measured)
            axes.scatter(predicted, measured, s=12, color=colors.get(arm, COLORS["dark"]), label=arm, alpha=0.8)
        axes.plot([0, most], [0, most], color=COLORS["dark"], linewidth=0.8, linestyle=":")
        axes.set_title(mix, fontsize=9)
        axes.set_xlabel("predicted, s")
    panels[0].set_ylabel("measured, s")
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
