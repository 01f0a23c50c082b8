"""Numbers → markdown: tables and `median (smallest–largest)`."""

from collections.abc import Sequence
from statistics import median

__all__ = ["percent", "spread", "table", "times"]


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """`median (smallest–largest)`; the median alone where there is one value."""
    shown = form.format(median(values))
    if len(values) < 2:
        return shown
    return f"{shown} ({form.format(min(values))}–{form.format(max(values))})"


def percent(values: Sequence[float], form: str = "{:.1f}") -> str:
    """`spread` of shares, in per cent."""
    return spread([100 * value for value in values], form) + " %"


def times(value: float) -> str:
    """A ratio with two digits after the point, and fewer for large ones: `1.38×`, `52×`."""
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"the row {list(row)} has {len(row)} cells, the header has {len(header)}")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
