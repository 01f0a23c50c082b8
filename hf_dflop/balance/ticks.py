"""Seconds as whole ticks: every rank must compute the same assignment on every platform.

Inputs: costs in seconds. Outputs: int64 ticks and the power of two that turns them back into seconds.

Sums of floats depend on the order of addition, which differs between compilers and vector units. Sums of whole
numbers do not. The scale is a power of two, so turning seconds into ticks rounds once and back not at all.

Assumptions: costs whose ratio to the largest is below about 1e-9 may round to zero ticks; they do not matter.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import BalanceError

__all__ = ["checked_seconds", "to_seconds", "to_ticks"]

TICK_BITS = 44
"""The sum of all ticks of a call stays below 2**TICK_BITS: exact in int64, and exact as float64 (53 bits)."""


def checked_seconds(values: Any, name: str) -> npt.NDArray[np.float64]:
    """`values` as a float64 array of finite, non-negative numbers.

    Raises:
        BalanceError: a value is NaN, infinite or negative, or is not a number.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BalanceError(f"{name} must be an array of numbers (seconds): {error}") from error
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        where = tuple(int(axis[0]) for axis in np.nonzero(bad))
        position = where[0] if len(where) == 1 else where
        raise BalanceError(
            f"{name} is {array[where]} at position {position}; costs must be finite and >= 0. "
            "Check the cost model or the shape columns of that sample."
        )
    return array


def to_ticks(seconds: npt.NDArray[np.float64], *, num_terms: int, largest: float) -> tuple[npt.NDArray[np.int64], int]:
    """Round seconds to ticks of 2**-bits seconds.

    Args:
        seconds (`npt.NDArray[np.float64]`): any shape, finite, >= 0, none above `largest`.
        num_terms (`int`): so many costs may be added up without leaving the exact range.
        largest (`float`): the largest cost of all arrays that share the scale.

    Returns:
        `tuple[npt.NDArray[np.int64], int]`: ticks in the shape of `seconds`, and `bits`.

    Example:
        >>> ticks, bits = to_ticks(np.array([1.0, 2.5]), num_terms=2, largest=2.5)
        >>> to_seconds(ticks[0] + ticks[1], bits)
        3.5
    """
    exponent = math.frexp(largest)[1] if largest > 0 else 0  # largest < 2**exponent
    bits = TICK_BITS - exponent - max(1, num_terms).bit_length()
    return np.rint(np.ldexp(seconds, bits)).astype(np.int64), bits


def to_seconds(ticks: Any, bits: int) -> Any:
    """Ticks (a whole number or an array of them) in seconds."""
    if np.ndim(ticks) == 0:
        return math.ldexp(float(ticks), -bits)
    return np.ldexp(np.asarray(ticks, dtype=np.float64), -bits)
