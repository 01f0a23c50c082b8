"""The balancing topic on the page."""

from statistics import mean, median
from typing import Any

from recipes.benchmarks.balancing.paint import paint_arms
from recipes.benchmarks.balancing.settings import MIXES, SAMPLERS
from recipes.benchmarks.common.figures import Figure
from recipes.benchmarks.common.results import Result
from recipes.benchmarks.common.tables import percent, spread, table

__all__ = ["figures", "section", "summary"]

_TARGETS = {"stock": 1.7, "best": 1.15, "waiting": 0.04}
_OURS = ("hf_dflop", "hf_dflop+packed")
_SUMMARY = ("stock", "group_by_length", "batch_rebalance", "hf_dflop", "hf_dflop+packed")
"""What `Trainer` has, and ours."""


def _runs(result: Result, mix: str) -> dict[str, list[dict[str, Any]]]:
    """arm → its runs by round."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in result.of_kind("run"):
        if row["mix"] == mix:
            runs.setdefault(row["arm"], []).append(row)
    return {arm: sorted(rows, key=lambda row: row["round"]) for arm, rows in runs.items()}


def _mixes(result: Result) -> list[str]:
    return [mix for mix in MIXES if _runs(result, mix)]


def _ratio(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[float]:
    """Samples a second of `runs` ÷ those of `base`, round by round (the samples are the same)."""
    return [b["seconds"] / r["seconds"] for r, b in zip(runs, base, strict=True)]


def _wall_to_compute(run: dict[str, Any]) -> float:
    return float(run["seconds"] / mean(run["busy_s"]))


def section(result: Result) -> str:
    """The targets, then a table for each mix."""
    parts = [_targets(result)]
    for mix in _mixes(result):
        runs = _runs(result, mix)
        stock = runs["stock"]
        rows = []
        for packed in (False, True):
            for sampler, shown in SAMPLERS.items():
                arm = f"{sampler}+packed" if packed else sampler
                if arm not in runs:
                    continue
                own = runs[arm]
                first = own[0]["held_out_loss"]
                rows.append(
                    [
                        f"{shown}{', packed' if packed else ''}",
                        spread([run["num_samples"] / run["seconds"] for run in own], "{:.1f}"),
                        spread(_ratio(own, stock)),
                        spread(_ratio(own, runs["stock+packed"])) if packed else "",
                        percent([run["waiting"] for run in own]),
                        spread([_wall_to_compute(run) for run in own]),
                        spread([b["wall_s"] / r["wall_s"] for r, b in zip(own, stock, strict=True)]),
                        spread([run["tokens"] / run["seconds"] for run in own], "{:.0f}"),
                        percent([run["padding_share"] for run in own], "{:.0f}"),
                        f"{first:.4f}" if first is not None else "–",
                    ]
                )
        header = [
            f"`{mix}`", "samples/s", "÷ stock", "÷ stock packed", "waiting", "seconds ÷ mean compute",
            "÷ stock by wall clock", "tokens/s", "padding", "held-out loss",
        ]  # fmt: skip
        parts.append(f"**{mix}** ({MIXES[mix]})\n\n{table(header, rows)}\n\n{_verdict(runs)}")
    return "\n\n".join(parts)


def summary(result: Result) -> str:
    """A small table of what `Trainer` has and ours, for the README."""
    mixes = _mixes(result)
    rows = []
    for arm in _SUMMARY:
        sampler, _, packed = arm.partition("+")
        cells = [f"{SAMPLERS[sampler]}{', packed' if packed else ''}"]
        for mix in mixes:
            runs = _runs(result, mix)
            cells.append(spread(_ratio(runs[arm], runs["stock"])) if arm != "stock" else "1")
            cells.append(percent([run["waiting"] for run in runs[arm]]))
        rows.append(cells)
    return table(["samples/s ÷ stock; ranks wait", *(cell for mix in mixes for cell in (f"`{mix}`", ""))], rows)


def _best_other(runs: dict[str, list[dict[str, Any]]], packed: bool | None) -> str:
    """The fastest arm that is not ours, among the padded ones, the packed ones, or all (None)."""
    others = [arm for arm in runs if arm not in _OURS and packed in (None, arm.endswith("+packed"))]
    return max(others, key=lambda arm: median(_ratio(runs[arm], runs["stock"])))


def _targets(result: Result) -> str:
    """One row for each mix: the three targets and whether they hold."""
    rows = []
    for mix in _mixes(result):
        runs = _runs(result, mix)
        ours = runs["hf_dflop+packed"]
        against = {
            "stock": ("stock", _TARGETS["stock"]),
            "padded": (_best_other(runs, False), _TARGETS["best"]),
            "packed": (_best_other(runs, True), _TARGETS["best"]),
        }
        cells = []
        for arm, target in against.values():
            values = _ratio(ours, runs[arm])
            mark = "✓" if median(values) >= target else "✗"
            cells.append(f"{spread(values)} {mark}" + ("" if arm == "stock" else f" ({arm})"))
        idle = [run["waiting"] for run in ours]
        mark = "✓" if median(idle) <= _TARGETS["waiting"] else "✗"
        rows.append([f"`{mix}`", *cells, f"{percent(idle)} {mark}"])
    header = [
        "hf_dflop packed, median (smallest–largest) of the rounds",
        f"÷ stock (wanted {_TARGETS['stock']})",
        f"÷ best other sampler, padded (wanted {_TARGETS['best']})",
        f"÷ best other sampler with our packed collator (wanted {_TARGETS['best']})",
        f"waiting (wanted ≤ {_TARGETS['waiting']:.0%})",
    ]
    return table(header, rows)


def _verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Which others are ahead of ours with the same collator, in the median of the rounds."""
    said = []
    for packed in (False, True):
        ours = runs[_OURS[packed]]
        words = "with the packed collator" if packed else "padded"
        ahead = []
        for arm, own in runs.items():
            ratio = median(_ratio(own, ours))
            if arm not in _OURS and arm.endswith("+packed") == packed and ratio > 1:
                ahead.append(f"{arm} ({spread(_ratio(own, ours))} of ours)")
        said.append(f"{words}: {', '.join(ahead) if ahead else 'none'}")
    alike = [own for arm, own in runs.items() if arm.endswith("+packed")]
    work = [[sum(run["busy_s"]) for run in rounds] for rounds in zip(*alike, strict=True)]
    noise = max(max(sums) / min(sums) - 1 for sums in work)
    return (
        f"Ahead of ours, {'; '.join(said)}. Packed arms all do the same work, and their computing seconds differ by "
        f"up to {noise:.0%}: nearer ratios are not resolved."
    )


def figures(result: Result) -> list[Figure]:
    """Speed and waiting of every arm, a panel for each mix."""
    data = {}
    for mix in _mixes(result):
        runs = _runs(result, mix)
        data[mix] = {
            arm: {
                "ratio": [round(value, 4) for value in _ratio(own, runs["stock"])],
                "idle": [round(run["waiting"], 4) for run in own],
            }
            for arm, own in runs.items()
        }
    return [
        Figure(
            name="balancing",
            alt="Samples per second relative to the stock sampler, and waiting, of every sampler padded and packed",
            data=data,
            paint=paint_arms,
            size=(10.0, 3.6),
        )
    ]
