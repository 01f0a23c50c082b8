"""The pipeline topic on the page."""

from itertools import combinations
from statistics import median
from typing import Any

from recipes.benchmarks.common.figures import COLORS, Figure
from recipes.benchmarks.common.results import Result, Row
from recipes.benchmarks.common.tables import spread, table
from recipes.benchmarks.pipeline.settings import ENGINE_ARMS, PADDING_ARMS

__all__ = ["figures", "section"]

_PREDICTIONS = {"predicted_s": "predicted", "calibrated_s": "calibrated"}
_TARGETS = {"error": 0.10, "overhead": 1.05, "padding": 1.5}


def _by_arm(rows: list[Row]) -> dict[str, list[Row]]:
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def _rounds(rows: list[Row], field: str = "seconds") -> list[float]:
    """Mean over the batches of each round."""
    rounds: dict[int, list[float]] = {}
    for row in rows:
        rounds.setdefault(row["round"], []).append(row[field])
    return [sum(values) / len(values) for _, values in sorted(rounds.items())]


def _is_tie(first: list[float], second: list[float]) -> bool:
    """Whether neither was faster in all rounds."""
    ahead = [a < b for a, b in zip(first, second, strict=True)]
    return any(ahead) and not all(ahead)


def section(result: Result) -> str:
    """Prediction, engine, padding: a paragraph and a table each."""
    parts = []
    if arms := _by_arm(result.of_kind("pipeline")):
        parts += ["### Predicted and measured steps of six plans\n", _prediction(arms), _actions(result)]
    if arms := _by_arm(result.of_kind("engine")):
        parts += ["### The engine alone\n", _engine(arms)]
    if arms := _by_arm(result.of_kind("padding")):
        parts += ["### Ragged microbatches against padding to the longest\n", _padding(arms)]
    return "\n\n".join(parts)


def _prediction(arms: dict[str, list[Row]]) -> str:
    seconds = {arm: _rounds(rows) for arm, rows in arms.items()}
    measured = {arm: median(values) for arm, values in seconds.items()}
    guesses = {
        field: {arm: sum(r[field] for r in rows) / len(rows) for arm, rows in arms.items()} for field in _PREDICTIONS
    }
    rank = {field: sorted(arms, key=guess.__getitem__) for field, guess in guesses.items()}
    ranked = sorted(arms, key=measured.__getitem__)
    rows = []
    for arm in arms:
        cells = [arm, spread(seconds[arm], "{:.3f}"), str(ranked.index(arm) + 1)]
        for field in _PREDICTIONS:
            guess = guesses[field][arm]
            cells += [f"{guess:.3f}", f"{100 * (guess / measured[arm] - 1):+.1f} %", str(rank[field].index(arm) + 1)]
        rows.append(cells)
    header = ["plan, grouping", "measured, s", "rank"]
    for name in _PREDICTIONS.values():
        header += [f"{name}, s", "error", "rank"]
    said = []
    for field, name in _PREDICTIONS.items():
        errors = [abs(guesses[field][arm] / measured[arm] - 1) for arm in arms]
        near = sum(error <= _TARGETS["error"] for error in errors)
        pairs = [pair for pair in combinations(arms, 2) if not _is_tie(seconds[pair[0]], seconds[pair[1]])]
        right = sum((guesses[field][a] < guesses[field][b]) == (measured[a] < measured[b]) for a, b in pairs)
        said.append(
            f"{name.capitalize()}: {near} of {len(arms)} within {100 * _TARGETS['error']:.0f} %, the largest error "
            f"{100 * max(errors):.1f} %; {right} of {len(pairs)} pairs of plans in the measured order"
        )
    ties = len(arms) * (len(arms) - 1) // 2 - len(pairs)
    told = f"{'. '.join(said)} ({ties} further pairs are ties: neither was faster in every round)."
    return f"{table(header, rows)}\n\n{told}"


def _actions(result: Result) -> str:
    rows = []
    for row in result.of_kind("action"):
        if not row["count"] or not row["measured_s"]:
            continue
        errors = [row["error"], row["calibrated_error"]]
        rows.append(
            [
                row["arm"],
                row["action"],
                str(row["count"]),
                f"{1e3 * row['measured_s']:.1f}",
                f"{1e3 * row['predicted_s']:.1f}",
                f"{1e3 * row['calibrated_s']:.1f}",
                *("–" if error is None else f"{100 * error:.0f} %" for error in errors),
            ]
        )
    header = [
        "plan, grouping", "what", "number", "measured, ms", "predicted, ms", "calibrated, ms", "median error",
        "calibrated",
    ]  # fmt: skip
    body = table(header, rows)
    return f"<details><summary>By kind of action, from the trace of the measured steps</summary>\n\n{body}\n</details>"


def _engine(arms: dict[str, list[Row]]) -> str:
    seconds = {arm: _rounds(rows) for arm, rows in arms.items()}
    rows = []
    for arm, shown in ENGINE_ARMS.items():
        ratios = [own / torch for own, torch in zip(seconds[arm], seconds["torch"], strict=True)]
        rows.append([shown, spread(seconds[arm], "{:.3f}"), spread(ratios, "{:.3f}")])
    ratio = median(own / torch for own, torch in zip(seconds["hf_dflop"], seconds["torch"], strict=True))
    traced = median(own / ours for own, ours in zip(seconds["hf_dflop traced"], seconds["hf_dflop"], strict=True))
    said = (
        f"Ours ÷ torch: {ratio:.3f} (target: at most {_TARGETS['overhead']}). With its trace ÷ without: {traced:.3f}. "
        "Forward and backward of all microbatches, without the optimizer."
    )
    return f"{table(['engine', 'seconds', '÷ torch, round by round'], rows)}\n\n{said}"


def _padding(arms: dict[str, list[Row]]) -> str:
    seconds = {arm: _rounds(rows) for arm, rows in arms.items()}
    base = seconds["torch padded"]
    ratios = {arm: [b / own for own, b in zip(values, base, strict=True)] for arm, values in seconds.items()}
    rows = []
    for arm, shown in PADDING_ARMS.items():
        if arm not in arms:
            continue
        rows.append(
            [
                shown,
                spread(seconds[arm]),
                spread(ratios[arm]) + "×",
                f"{sum(_rounds(arms[arm], 'tokens')) / len(base):.0f}",
                f"{sum(_rounds(arms[arm], 'tiles')) / len(base):.0f}",
            ]
        )
    ours = {arm: median(values) for arm, values in ratios.items() if arm not in ("torch padded", "DDP", "FSDP2")}
    best = max(ours, key=ours.__getitem__)
    ahead = [
        f"{arm} ({median(ratios[arm]) / ours[best]:.2f} of ours)"
        for arm in ("DDP", "FSDP2")
        if arm in ratios and median(ratios[arm]) > ours[best]
    ]
    said = (
        f"Ragged, with microbatches and order of the stock run: {ours['stock 1f1b']:.2f}× padded (target: at least "
        f"{_TARGETS['padding']}); the best of ours, {PADDING_ARMS[best].replace('**', '')}: {ours[best]:.2f}×. "
        + (f"Faster than the best of ours on two processes: {', '.join(ahead)}." if ahead else "")
    )
    header = ["arm", "seconds a step", "faster than padded", "token positions", "tiles"]
    return f"{table(header, rows)}\n\n{said}"


def figures(result: Result) -> list[Figure]:
    """Predicted beside measured steps; seconds of every padding arm."""
    found = []
    if arms := _by_arm(result.of_kind("pipeline")):
        data: dict[str, Any] = {
            arm: {
                "measured": _rounds(rows),
                **{name: sum(r[field] for r in rows) / len(rows) for field, name in _PREDICTIONS.items()},
            }
            for arm, rows in arms.items()
        }
        alt = "Measured, predicted and calibrated seconds of a step under six plans"
        found.append(Figure(name="pipeline_prediction", alt=alt, data=data, paint=_paint_prediction))
    if arms := _by_arm(result.of_kind("padding")):
        data = {arm: _rounds(rows) for arm, rows in arms.items()}
        alt = "Seconds of a step: padded to the longest, ragged in several orders, DDP, FSDP2"
        found.append(Figure(name="pipeline_padding", alt=alt, data=data, paint=_paint_padding))
    return found


def _paint_prediction(canvas: Any, data: dict[str, dict[str, Any]]) -> None:
    axes = canvas.subplots()
    for i, found in enumerate(data.values()):
        axes.bar(i, median(found["measured"]), width=0.6, color=COLORS["light"], label="measured" if not i else None)
        axes.vlines(i, min(found["measured"]), max(found["measured"]), color=COLORS["dark"], linewidth=1)
        for shift, name, color in ((-0.12, "predicted", "other"), (0.12, "calibrated", "ours")):
            axes.plot(i + shift, found[name], "o", color=COLORS[color], label=name if not i else None)
    axes.set_xticks(range(len(data)), [arm.replace(", ", "\n") for arm in data], fontsize=8)
    axes.set_ylabel("seconds of a step")
    axes.legend(fontsize=8, frameon=False)


def _paint_padding(canvas: Any, data: dict[str, list[float]]) -> None:
    axes = canvas.subplots()
    names = [arm for arm in PADDING_ARMS if arm in data][::-1]
    values = [median(data[arm]) for arm in names]
    colors = {"torch padded": "other", "DDP": "light", "FSDP2": "light"}
    axes.barh(names, values, color=[COLORS[colors.get(arm, "ours")] for arm in names])
    for i, arm in enumerate(names):
        axes.hlines(i, min(data[arm]), max(data[arm]), color=COLORS["dark"], linewidth=1)
    axes.set_xlabel("seconds of a step, forward and backward")
