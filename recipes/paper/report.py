"""The table and the figure of a run: ratios, idle time, ablations, the paper's claims; curves over GPUs."""

from pathlib import Path
from typing import Any

from recipes.paper.run import ratio
from recipes.paper.settings import SCALING, SETTINGS

__all__ = ["draw_scaling", "write_scaling_table", "write_table"]


def _times(run: dict[str, Any], arm: str, to: str = "homogeneous") -> str:
    found = ratio(run, arm, to)
    return "–" if found is None else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"


def _idle(run: dict[str, Any], arm: str) -> str:
    value = run["arms"].get(arm, {}).get("idle_fraction")
    return "–" if value is None else f"{value:.0%}"


def write_table(results: dict[str, Any], path: Path) -> str:
    """Write the table of the settings as Markdown, and give it back."""
    lines = [
        "| model | GPUs | encoder's share | homogeneous: s, idle | balancer only | planner only | both | idle "
        "| anything | FSDP, stock | paper's claim |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    layouts = []
    for setting in SETTINGS:
        run = results.get(f"{setting.name}@{setting.num_gpus}")
        if run is None:
            continue
        plain = run["arms"]["homogeneous"]
        base = "nothing fits" if plain["step_s"] is None else f"{plain['step_s']:.1f}, {_idle(run, 'homogeneous')}"
        cells = [
            setting.name, str(run["num_gpus"]), f"{run['vision_share']:.0%}", base, _times(run, "balancer only"),
            _times(run, "planner only"), _times(run, "both"), _idle(run, "both"), _times(run, "anything"),
            _times(run, "fsdp"), setting.claims,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        for arm in ("homogeneous", "both", "anything"):
            layouts.append(f"- {setting.name}, {arm}: {run['arms'][arm]['layout']}")
    text = "\n".join([*lines, "", *layouts])
    path.write_text(text + "\n", encoding="utf-8")
    return text


def write_scaling_table(results: dict[str, Any], path: Path) -> str:
    """Write the speed-ups over the homogeneous layout by GPUs as Markdown, and give it back."""
    sizes = sorted({run["num_gpus"] for run in results.values() if run["num_gpus"] != 32})
    lines = ["| model | " + " | ".join(f"{size:,} GPUs" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for setting in SCALING:
        cells = []
        for size in sizes:
            run = results.get(f"{setting.name}@{size}")
            if run is None:
                cells.append("not run")
            elif (both := ratio(run, "both")) is None:
                none_fits = all(arm["step_s"] is None for arm in run["arms"].values())
                cells.append("nothing fits" if none_fits else "homogeneous does not fit")
            else:
                anything = ratio(run, "anything")
                cells.append(f"{both[0]:.2f} / " + ("–" if anything is None else f"{anything[0]:.2f}"))
        lines.append(f"| {setting.name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    path.write_text(text + "\n", encoding="utf-8")
    return text


def draw_scaling(results: dict[str, Any], path: Path) -> None:
    """Speed-up over the homogeneous layout, and samples per second and GPU, against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for number, setting in enumerate(SCALING):
        runs = sorted((run for run in results.values() if run["name"] == setting.name), key=lambda r: r["num_gpus"])
        color = f"C{number}"
        points = [(run["num_gpus"], found[0]) for run in runs if (found := ratio(run, "both")) is not None]
        if points:
            left.plot(*zip(*points, strict=True), "o-", color=color, label=setting.name)
        for arm, line in (("both", "-"), ("homogeneous", ":")):
            rates = [
                (run["num_gpus"], run["global_batch_size"] / run["num_gpus"] / run["arms"][arm]["step_s"])
                for run in runs
                if run["arms"][arm]["step_s"] is not None
            ]
            if rates:
                right.plot(*zip(*rates, strict=True), line, marker=".", color=color)
    left.set(xlabel="GPUs", ylabel="speed-up over homogeneous 3D", xscale="log", title="planner and balancer")
    right.set(
        xlabel="GPUs",
        ylabel="samples per second and GPU",
        xscale="log",
        yscale="log",
        title="solid: both, dotted: homogeneous",
    )
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.tick_params(axis="y", which="minor", labelsize=7)
    for axes in (left, right):
        axes.set_xticks([8, 16, 64, 256, 1024], ["8", "16", "64", "256", "1,024"])
        axes.grid(alpha=0.3)
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
