"""The GPU topic on the page: curves, samplers, predictions, the engine."""

from statistics import median
from typing import Any

import numpy as np

from recipes.benchmarks.balancing.paint import paint_arms
from recipes.benchmarks.balancing.settings import SAMPLERS
from recipes.benchmarks.common.figures import COLORS, Figure
from recipes.benchmarks.common.results import Result, Row
from recipes.benchmarks.common.tables import percent, spread, table
from recipes.benchmarks.gpu.settings import ENGINE_ARMS, MIX_NAMES
from recipes.benchmarks.prediction.report import paint_points

__all__ = ["figures", "section"]

_TARGETS = {"median": 0.05, "p95": 0.15, "stock": 1.7, "best": 1.15, "waiting": 0.04, "overhead": 1.05}
_SHOWN = ("stock", "stock+packed", "hf_dflop", "hf_dflop+packed")
"""Arms whose microbatches are in the figure; all are in the table."""

Runs = dict[str, list[Row]]
"""arm -> its runs by round."""


def _runs(result: Result, mix: str) -> Runs:
    runs: Runs = {}
    for row in result.of_kind("replay"):
        if row["mix"] == mix:
            runs.setdefault(row["arm"], []).append(row)
    return {arm: sorted(rows, key=lambda row: row["round"]) for arm, rows in runs.items()}


def _mixes(result: Result) -> dict[str, Runs]:
    return {mix: runs for mix in MIX_NAMES if (runs := _runs(result, mix))}


def _fitting(runs: Runs) -> Runs:
    """Arms whose microbatches fitted the memory in every round."""
    return {arm: rows for arm, rows in runs.items() if all(row["fits"] for row in rows)}


def _ratio(runs: list[Row], base: list[Row]) -> list[float]:
    """Samples a second of `runs` ÷ those of `base`, round by round: the samples are the same."""
    return [b["seconds"] / r["seconds"] for r, b in zip(runs, base, strict=True)]


def section(result: Result) -> str:
    """A heading, a paragraph and a table for each part that was run."""
    parts: list[str] = []
    if modules := result.of_kind("module"):
        parts += ["### Module curves\n", _curves(modules)]
    mixes = _mixes(result)
    if mixes:
        parts.append("### Samplers, replayed rank by rank\n")
        parts += [_replay(mix, runs) for mix, runs in mixes.items()]
        parts += ["### Predicted and measured microbatches\n", _prediction(mixes)]
    if rows := result.of_kind("engine"):
        parts += ["### Two stages on one device\n", _engine(rows)]
    return "\n\n".join(parts)


def _mark(holds: bool) -> str:
    return "✓" if holds else "✗"


def _curves(modules: list[Row]) -> str:
    rows = []
    for row in modules:
        holds = row["median_error"] <= _TARGETS["median"] and row["p95_error"] <= _TARGETS["p95"]
        rows.append(
            [
                row["module"],
                str(row["num_fitted"]),
                str(row["num_held_out"]),
                f"{row['most_tokens']}",
                f"{100 * row['median_error']:.1f} %",
                f"{100 * row['p95_error']:.1f} % {_mark(holds)}",
            ]
        )
    header = [
        "module", "fitted points", "held-out points", "largest, positions",
        f"median error (wanted ≤ {_TARGETS['median']:.0%})", f"95th percentile (wanted ≤ {_TARGETS['p95']:.0%})",
    ]  # fmt: skip
    said = "Forward and backward seconds of random sizes and other depths, which no curve has seen."
    return f"{table(header, rows)}\n\n{said}"


def _replay(mix: str, runs: Runs) -> str:
    fitting = _fitting(runs)
    rows = []
    for packed in (False, True):
        for sampler, shown in SAMPLERS.items():
            arm = f"{sampler}+packed" if packed else sampler
            if arm not in runs:
                continue
            name = f"{shown}{', packed' if packed else ''}"
            if arm not in fitting:
                rows.append([name, "does not fit", *[""] * 3, _computed(runs[arm]), _peak(runs[arm])])
                continue
            own = fitting[arm]
            rows.append(
                [
                    name,
                    spread([run["num_samples"] / run["seconds"] for run in own], "{:.1f}"),
                    _over(own, fitting.get("stock")),
                    _over(own, fitting.get("stock+packed")) if packed else "",
                    percent([run["waiting"] for run in own]),
                    _computed(own),
                    _peak(own),
                ]
            )
    header = [
        f"`{mix}`", "samples/s", "÷ stock", "÷ stock packed", "waiting", "positions computed ÷ tokens",
        "peak memory, GiB",
    ]  # fmt: skip
    return f"**{mix}**\n\n{table(header, rows)}\n\n{_verdict(fitting)}"


def _over(own: list[Row], base: list[Row] | None) -> str:
    return spread(_ratio(own, base)) if base else "–"


def _computed(runs: list[Row]) -> str:
    return spread([run["computed_tokens"] / run["tokens"] for run in runs])


def _peak(runs: list[Row]) -> str:
    peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"]]
    return f"{max(peaks) / 2**30:.0f}" if peaks else "–"


def _verdict(runs: Runs) -> str:
    """Ours against stock and the best other, padded and packed; targets."""
    ours = runs.get("hf_dflop+packed")
    if ours is None or "stock" not in runs:
        return "hf_dflop packed or stock did not fit: nothing to compare."
    stock = _ratio(ours, runs["stock"])
    said = [f"hf_dflop packed ÷ stock: {spread(stock)} (wanted {_TARGETS['stock']}) {_held(stock, 'stock')}"]
    for packed in (False, True):
        others = [arm for arm in runs if not arm.startswith("hf_dflop") and arm.endswith("+packed") == packed]
        if not others:
            continue
        best = max(others, key=lambda arm: median(_ratio(runs[arm], runs["stock"])))
        values = _ratio(ours, runs[best])
        said.append(
            f"÷ the best other {'packed' if packed else 'padded'} ({best}): {spread(values)} (wanted "
            f"{_TARGETS['best']}) {_held(values, 'best')}"
        )
    waits = [run["waiting"] for run in ours]
    said.append(
        f"waiting {percent(waits)} (wanted ≤ {_TARGETS['waiting']:.0%}) {_mark(median(waits) <= _TARGETS['waiting'])}"
    )
    return "; ".join(said) + "."


def _held(values: list[float], target: str) -> str:
    return _mark(median(values) >= _TARGETS[target])


def _prediction(mixes: dict[str, Runs]) -> str:
    rows = []
    for mix, runs in mixes.items():
        for arm, own in _fitting(runs).items():
            predicted, measured = np.array([pair for run in own for pair in run["predicted_measured_s"]]).T
            error = np.abs(predicted / measured - 1)
            rows.append(
                [
                    f"`{mix}`",
                    arm,
                    str(len(predicted)),
                    f"{100 * np.median(error):.0f} %",
                    f"{100 * np.percentile(error, 95):.0f} %",
                    f"{measured.sum() / predicted.sum():.2f}",
                    percent([run["predicted_waiting"] for run in own]),
                    percent([run["waiting"] for run in own]),
                ]
            )
    header = [
        "mix", "arm", "microbatches", "median error", "95th percentile", "measured ÷ predicted, all",
        "waiting predicted", "waiting measured",
    ]  # fmt: skip
    said = (
        "Seconds predicted from the module curves alone, which know none of these microbatches. An error that all "
        "microbatches share does not matter to balancing; ranks wait for what differs between them."
    )
    return f"{table(header, rows)}\n\n{said}"


def _engine(rows: list[Row]) -> str:
    seconds = {
        arm: [row["seconds"] for row in sorted(rows, key=lambda row: row["round"]) if row["arm"] == arm]
        for arm in ENGINE_ARMS
    }

    def ratios(arm: str, base: str) -> list[float]:
        return [own / other for own, other in zip(seconds[arm], seconds[base], strict=True)]

    body = [
        [
            shown,
            spread([1e3 * value for value in seconds[arm]], "{:.1f}"),
            spread(ratios(arm, "unsplit"), "{:.3f}"),
            spread(ratios(arm, "torch"), "{:.3f}"),
        ]
        for arm, shown in ENGINE_ARMS.items()
    ]
    ratio = median(ratios("hf_dflop", "torch"))
    said = (
        f"Ours ÷ torch: {ratio:.3f} (wanted at most {_TARGETS['overhead']}) {_mark(ratio <= _TARGETS['overhead'])}. "
        "Forward and backward of a step's microbatches, without the optimizer; losses and norms of gradients agree."
    )
    return f"{table(['engine', 'ms a step', '÷ unsplit, round by round', '÷ torch, round by round'], body)}\n\n{said}"


def figures(result: Result) -> list[Figure]:
    """Held-out errors, speed of every arm, measured against predicted microbatches."""
    found = []
    if modules := result.of_kind("module"):
        data: dict[str, Any] = {row["module"]: row["tokens_seconds_error"] for row in modules}
        alt = "Error of the module curves on sizes that were not fitted, by module and positions"
        found.append(Figure(name="gpu_curves", alt=alt, data=data, paint=_paint_curves))
    if mixes := {mix: _fitting(runs) for mix, runs in _mixes(result).items()}:
        data = {
            mix: {
                arm: {
                    "ratio": [round(value, 4) for value in _ratio(own, runs["stock"])],
                    "idle": [round(run["waiting"], 4) for run in own],
                }
                for arm, own in runs.items()
            }
            for mix, runs in mixes.items()
            if "stock" in runs
        }
        alt = "Samples per second relative to the stock sampler, and waiting, of every sampler replayed on one GPU"
        if data:
            found.append(Figure(name="gpu_replay", alt=alt, data=data, paint=paint_arms, size=(10.0, 3.6)))
        data = {
            mix: {arm: [p for run in runs[arm] for p in run["predicted_measured_s"]] for arm in _SHOWN if arm in runs}
            for mix, runs in mixes.items()
        }
        alt = "Measured against predicted seconds of microbatches on one GPU, by mix"
        found.append(Figure(name="gpu_prediction", alt=alt, data=data, paint=paint_points, size=(9.0, 3.2)))
    return found


def _paint_curves(canvas: Any, data: dict[str, list[list[float]]]) -> None:
    axes = canvas.subplots()
    colors = (COLORS["ours"], COLORS["second"], COLORS["other"], COLORS["dark"])
    for (module, points), color in zip(data.items(), colors, strict=False):
        tokens, _, errors = zip(*points, strict=True)
        axes.scatter(tokens, [100 * error for error in errors], s=14, color=color, label=module)
    for target, style in (("median", "--"), ("p95", ":")):
        axes.axhline(100 * _TARGETS[target], color=COLORS["dark"], linewidth=0.8, linestyle=style)
    axes.set_xscale("log")
    axes.set_xlabel("positions of the microbatch")
    axes.set_ylabel("error on held-out sizes, %")
    axes.legend(fontsize=8, frameon=False)
