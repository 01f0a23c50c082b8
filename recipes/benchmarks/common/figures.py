"""Figures as small SVG files that carry a digest of the numbers they show.

The drawing depends on the version of matplotlib, the digest only on the numbers: a test compares it with the JSON.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "Figure", "digest_of", "draw"]

COLORS = {"ours": "#c1121f", "other": "#8d99ae", "dark": "#2b2d42", "light": "#ced4da", "second": "#1d7874"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure of the page: its numbers, and how to draw them."""

    name: str
    """File name without suffix."""
    alt: str
    """What one sees, in a sentence."""
    data: Any
    """Plain JSON; the only input of `paint`."""
    paint: Callable[[Any, Any], None]
    """Draws the data into a matplotlib figure: `paint(figure, data)`."""
    size: tuple[float, float] = (8.0, 3.4)
    """Inches."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]


def draw(figure: Figure, folder: Path) -> Path:
    """Write `<folder>/<name>.svg`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {
        "svg.hashsalt": figure.name,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(settings):
        canvas = pyplot.figure(figsize=figure.size, layout="constrained")
        figure.paint(canvas, figure.data)
        path = folder / f"{figure.name}.svg"
        metadata = {"Date": None, "Creator": None, "Description": f"data {figure.digest}"}
        canvas.savefig(path, format="svg", metadata=metadata, facecolor="white")
        pyplot.close(canvas)
    return path


def digest_of(path: Path) -> str | None:
    """The digest that `draw` left in an SVG file."""
    found = re.search(r"data ([0-9a-f]{16})", path.read_text(encoding="utf-8"))
    return found.group(1) if found else None
