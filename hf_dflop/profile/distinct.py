"""Quantiles of counts without a copy of them: the distinct values of a column, and how often each is there.

Counts are whole numbers and few of them differ, so a table of them stays small however many rows there are.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from hf_dflop.shapes import Shapes

__all__ = ["distinct", "quantiles"]

_ROWS = 65_536
"""Rows that are looked at together."""

_Counts = npt.NDArray[np.int64]


def distinct(shapes: Shapes, left_out: Sequence[int] = ()) -> dict[str, tuple[_Counts, _Counts]]:
    """Values that each count takes, ascending, and the number of samples of each value.

    Args:
        shapes (`Shapes`): the samples.
        left_out (`Sequence[int]`): samples that are not looked at.

    Returns:
        `dict`: by the field names of `Shapes`, and for `llm_tokens`.
    """
    dropped = np.sort(np.asarray(left_out, dtype=np.int64))
    nothing = np.empty(0, np.int64)
    found = dict.fromkeys((*(field.name for field in fields(Shapes)), "llm_tokens"), (nothing, nothing))
    for start in range(0, len(shapes), _ROWS):
        part = shapes.select(slice(start, start + _ROWS))
        here = dropped[np.searchsorted(dropped, start) : np.searchsorted(dropped, start + _ROWS)] - start
        for name, (values, times) in found.items():
            new, number = np.unique(np.delete(getattr(part, name), here), return_counts=True)
            merged, place = np.unique(np.concatenate([values, new]), return_inverse=True)
            weights = np.concatenate([times, number])
            found[name] = merged, np.bincount(place, weights=weights, minlength=len(merged)).astype(np.int64)
    return found


def quantiles(values: _Counts, times: _Counts, at: Sequence[float]) -> list[float]:
    """`np.quantile(np.repeat(values, times), at)`, linear between the two samples around each."""
    ends = times.cumsum()
    places = np.asarray(at) * (ends[-1] - 1)
    below, above = (values[np.searchsorted(ends, edge, side="right")] for edge in (np.floor(places), np.ceil(places)))
    return (below + (above - below) * (places - np.floor(places))).tolist()
