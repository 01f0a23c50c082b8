"""The scale topic on the page."""

from statistics import mean
from typing import Any

from recipes.benchmarks.balancing.settings import SAMPLERS
from recipes.benchmarks.common.figures import COLORS, Figure
from recipes.benchmarks.common.results import Result
from recipes.benchmarks.common.tables import table

__all__ = ["figures", "section"]

_SYNC = {"step": "ranks meet once a step (DDP)", "stage": "ranks meet in every layer (FSDP, ZeRO-3)"}


def _grid(result: Result, mix: str, sync: str, packed: bool) -> dict[str, dict[int, float]]:
    """sampler → ranks → mean efficiency."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in result.of_kind("efficiency"):
        if (row["mix"], row["sync"], row["packed"]) == (mix, sync, packed):
            found.setdefault(row["sampler"], {}).setdefault(row["num_ranks"], []).append(row["efficiency"])
    return {name: {n: mean(values) for n, values in by_ranks.items()} for name, by_ranks in found.items()}


def section(result: Result) -> str:
    """A table for each mix and way of meeting, and the scheduling times."""
    parts = []
    ranks = sorted({row["num_ranks"] for row in result.of_kind("efficiency")})
    lost: list[str] = []
    for mix in dict.fromkeys(row["mix"] for row in result.of_kind("efficiency")):
        for sync, words in _SYNC.items():
            rows = []
            for sampler, shown in SAMPLERS.items():
                cells = []
                for packed in (False, True):
                    grid = _grid(result, mix, sync, packed)
                    cells += [f"{grid[sampler][n]:.2f}" if n in grid[sampler] else "–" for n in ranks]
                rows.append([shown, *cells])
            for packed in (False, True):
                grid = _grid(result, mix, sync, packed)
                for n in ranks:
                    best = max((name for name in grid if n in grid[name]), key=lambda name: grid[name][n])
                    if best != "hf_dflop" and grid[best][n] > grid["hf_dflop"][n] + 0.005:
                        how = "packed" if packed else "padded"
                        lost.append(
                            f"{mix}, {words}, {how}, {n} ranks: {SAMPLERS[best]} {grid[best][n]:.2f} against "
                            f"{grid['hf_dflop'][n]:.2f}"
                        )
            header = ["sampler", *(f"padded, {n}" for n in ranks), *(f"packed, {n}" for n in ranks)]
            parts.append(f"`{mix}`, {words}: useful ÷ spent seconds by number of ranks\n\n{table(header, rows)}")
    if lost:
        parts.append("Cells in which another is ahead of ours:\n\n" + "\n".join(f"- {line}" for line in lost))
    else:
        parts.append("Ours is ahead in every cell.")
    first = result.of_kind("efficiency")[0]["mix"]
    deals: dict[str, dict[int, float]] = {}
    for row in result.of_kind("efficiency"):
        if row["mix"] == first and row["seed"] == 0:
            deals.setdefault(row["sampler"], {})[row["num_ranks"]] = row["deal_s_per_step"]
    header = ["seconds to group one step, as run here", *(f"{n} ranks" for n in ranks)]
    rows = [
        [shown, *(f"{deals[name][n]:.2g}" if n in deals[name] else "–" for n in ranks)]
        for name, shown in SAMPLERS.items()
    ]
    parts.append(table(header, rows))
    sizes = sorted({row["num_samples"] for row in result.of_kind("scheduling")})
    rows = []
    for packed in (False, True):
        for sync, words in _SYNC.items():
            times = {
                row["num_samples"]: sorted(row["seconds"])[len(row["seconds"]) // 2]
                for row in result.of_kind("scheduling")
                if row["sync"] == sync and row["packed"] == packed
            }
            rows.append([f"{'packed' if packed else 'padded'}, {words}", *(f"{times[n] * 1e3:.3g} ms" for n in sizes)])
    header = ["time to group a step of", *(f"{n} samples" for n in sizes)]
    parts.append(f"{table(header, rows)}\n\nA step is grouped in a thread of its own, ahead of the training loop.")
    return "\n\n".join(parts)


def figures(result: Result) -> list[Figure]:
    """Efficiency by ranks for both ways of meeting, packed; scheduling time by samples."""
    mix = result.of_kind("efficiency")[0]["mix"]
    lines = {
        f"{words}, {'packed' if packed else 'padded'}": {
            name: sorted(by_ranks.items()) for name, by_ranks in _grid(result, mix, sync, packed).items()
        }
        for packed in (False, True)
        for sync, words in (("step", "DDP"), ("stage", "FSDP"))
    }
    alt = "Simulated efficiency of each sampler from 8 to 4096 ranks, padded and packed"
    return [Figure(name="scale", alt=alt, data=lines, paint=_paint, size=(9.5, 3.2))]


def _paint(canvas: Any, data: dict[str, dict[str, list[list[float]]]]) -> None:
    panels = canvas.subplots(1, len(data), sharey=True)
    for axes, (title, lines) in zip(panels, data.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            ours = name == "hf_dflop"
            n, value = zip(*points, strict=True)
            color = COLORS["ours"] if ours else f"C{number}"
            label = SAMPLERS[name].strip("*")
            axes.plot(n, value, marker="osD^vPX"[number % 7], markersize=4, color=color, label=label,
                      linewidth=2.2 if ours else 1.1, zorder=3 if ours else 2)  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({n for points in lines.values() for n, _ in points})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("ranks")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("useful ÷ spent seconds")
    canvas.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
