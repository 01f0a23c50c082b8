"""Bars of every sampler, padded and packed: the figure of the balancing topic and of those that replay it."""

from statistics import median
from typing import Any

from recipes.benchmarks.balancing.settings import SAMPLERS
from recipes.benchmarks.common.figures import COLORS

__all__ = ["paint_arms"]


def paint_arms(canvas: Any, data: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Draw a panel of bars for each mix.

    Args:
        canvas (`matplotlib.figure.Figure`): where to draw.
        data (`dict`): mix -> arm -> `ratio` (samples a second ÷ stock) and `idle` (share that ranks wait), by round.
    """
    panels = canvas.subplots(1, len(data), sharey=True, squeeze=False)[0]
    order = list(SAMPLERS)
    for axes, (mix, arms) in zip(panels, data.items(), strict=True):
        for packed in (False, True):
            for at, sampler in enumerate(order):
                arm = arms.get(f"{sampler}+packed" if packed else sampler)
                if arm is None:
                    continue
                y = at + (0.2 if packed else -0.2)
                value = median(arm["ratio"])
                own = sampler == "hf_dflop"
                color = COLORS["ours"] if own else COLORS["second"] if packed else COLORS["other"]
                axes.barh(y, value, height=0.36, color=color, alpha=1.0 if packed or not own else 0.6)
                axes.plot([min(arm["ratio"]), max(arm["ratio"])], [y, y], color=COLORS["dark"], linewidth=1)
                waits = f"waits {100 * median(arm['idle']):.0f} %"
                axes.annotate(
                    waits, (max(*arm["ratio"], value), y), (4, 0), textcoords="offset points", va="center", fontsize=7
                )
        axes.axvline(1, color=COLORS["dark"], linewidth=0.8, linestyle=":")
        axes.set_xlim(right=axes.get_xlim()[1] * 1.25)
        axes.set_xlabel("samples/s ÷ stock padded")
        axes.set_title(mix, fontsize=9)
    panels[0].set_yticks(range(len(order)), [SAMPLERS[name].strip("*") for name in order])
    panels[0].invert_yaxis()
    from matplotlib.patches import Patch

    handles = [
        Patch(color=COLORS["other"], label="padded"),
        Patch(color=COLORS["second"], label="with our packed collator"),
        Patch(color=COLORS["ours"], alpha=0.6, label="hf_dflop, padded"),
        Patch(color=COLORS["ours"], label="hf_dflop, packed"),
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
