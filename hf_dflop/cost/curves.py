"""Seconds (or bytes) of a part as a curve over the size of the microbatch, fitted to measured points.

In: measured points `(tokens, pairs, depth, seconds)`. Out: two curves, one of a layer and one of what does not repeat
with the layers:

    seconds = fixed(tokens) + depth · layer(tokens, pairs)
    curve   = base + f(tokens) + tokens · h(pairs / tokens)

f and h are piecewise linear, rise from 0 and never fall. Pairs are the sum over sequences of length²: `pairs / tokens`
is the (mean) length, and h what attention takes per token. The slopes of h never rise (longer sequences use a kernel
better, and windows end), so `tokens · h` grows in tokens and in pairs: no curve falls when a sequence is added.

Non-negative least squares on relative errors; neighbouring slopes are pulled together weakly, so that a point that
was measured badly bends the curve little, and what no point says is filled in evenly.

Assumptions: beyond the largest measured size f goes on with its last slope, or the mean one if that is steeper, h
with its last; the curve says so (`is_beyond`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.fit import nnls
from hf_dflop.errors import ModelError

__all__ = ["Curve", "fit_curves"]

FloatArray = npt.NDArray[np.float64]

_SMOOTHNESS = 0.05
"""Weight of the pull between neighbouring slopes: a change of slope that would move the seconds at the knot by 40 per
cent weighs as much as a point that is 2 per cent off."""
_KNOT_RATIO = 1.4
"""Knots lie at measured sizes, at least this factor apart."""


def _ramps(values: FloatArray, knots: tuple[float, ...]) -> FloatArray:
    """How far each value reaches into each segment, `(num_values, num_segments)`; the last segment has no end."""
    starts = np.asarray((0.0, *knots[:-1]))
    widths = np.diff(np.asarray((0.0, *knots)))
    widths[-1] = np.inf
    return np.clip(values[:, None] - starts, 0.0, widths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A curve that never falls: base, and slopes between knots (the last slope goes on).

    Example:
        >>> curve = Curve(base=1.0, token_knots=(10.0, 20.0), token_slopes=(0.1, 0.2))
        >>> curve.at([10, 20, 30]).tolist(), curve.is_beyond([30]).tolist()
        ([2.0, 4.0, 6.0], [True])
    """

    base: float = 0.0
    token_knots: tuple[float, ...] = (1.0,)
    """Ends of the segments of f; the last one is the largest measured number of tokens."""
    token_slopes: tuple[float, ...] = (0.0,)
    length_knots: tuple[float, ...] = (1.0,)
    """Ends of the segments of h; the last one is the longest measured sequence."""
    length_slopes: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        for name in ("token_knots", "token_slopes", "length_knots", "length_slopes"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for knots, slopes in ((self.token_knots, self.token_slopes), (self.length_knots, self.length_slopes)):
            if len(knots) != len(slopes) or not knots or sorted({*knots, 0.0}) != [0.0, *knots]:
                raise ModelError(f"a curve has knots {knots} and slopes {slopes}; one slope to each rising knot > 0.")
            if not (np.isfinite(slopes).all() and min(slopes) >= 0 and self.base >= 0):
                raise ModelError(f"a curve has base {self.base} and slopes {slopes}; they must be finite and >= 0.")

    def at(self, tokens: npt.ArrayLike, pairs: npt.ArrayLike | None = None) -> FloatArray:
        """Value for microbatches.

        Args:
            tokens (`(num,)`): tokens of each microbatch; one without any is 0.
            pairs (`(num,)`, *optional*): sum over its sequences of length²; 0 if not given.

        Returns:
            `(num,)` float64.
        """
        count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
        squares = np.zeros_like(count) if pairs is None else np.atleast_1d(np.asarray(pairs, dtype=np.float64))
        length = squares / np.maximum(count, 1.0)
        value = self.base + _rise(count, self.token_knots, self.token_slopes)
        return np.where(count > 0, value + count * self.lengths_at(length), 0.0)

    def is_beyond(self, tokens: npt.ArrayLike, pairs: npt.ArrayLike | None = None) -> npt.NDArray[np.bool_]:
        """Which microbatches are larger, or have longer sequences, than anything measured, `(num,)`."""
        count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
        beyond = count > self.token_knots[-1] * (1 + 1e-9)
        if pairs is not None and any(self.length_slopes):
            length = np.atleast_1d(np.asarray(pairs, dtype=np.float64)) / np.maximum(count, 1.0)
            beyond = beyond | (length > self.length_knots[-1] * (1 + 1e-9))
        return np.asarray(beyond)

    def line(self) -> tuple[float, float]:
        """Base and slope of the straight line through f at a quarter of the largest size and at the largest: what
        additive costs use."""
        largest = self.token_knots[-1]
        low, high = self.at([largest / 4, largest])
        slope = max((high - low) / (0.75 * largest), 0.0)
        return max(float(high - slope * largest), 0.0), float(slope)

    def lengths_at(self, length: npt.ArrayLike) -> FloatArray:
        """h: what attention takes per token of a sequence of this length."""
        values = np.atleast_1d(np.asarray(length, dtype=np.float64))
        return np.asarray(_ramps(values, self.length_knots) @ np.asarray(self.length_slopes))


def _rise(values: FloatArray, knots: tuple[float, ...], slopes: tuple[float, ...]) -> FloatArray:
    """Value of a piecewise linear function from 0; behind the last knot with the last or the mean slope."""
    rates = np.asarray(slopes)
    mean = float(_ramps(np.asarray([knots[-1]]), knots)[0] @ rates) / knots[-1]
    beyond = np.maximum(values - knots[-1], 0.0) * max(mean - slopes[-1], 0.0)
    return np.asarray(_ramps(values, knots) @ rates + beyond)


def _knots(values: FloatArray) -> tuple[float, ...]:
    """Measured sizes, thinned from the largest down."""
    chosen: list[float] = []
    for value in np.unique(values[values > 0])[::-1]:
        if not chosen or chosen[-1] >= _KNOT_RATIO * value:
            chosen.append(float(value))
    return tuple(chosen[::-1]) or (1.0,)


def fit_curves(
    tokens: npt.ArrayLike,
    pairs: npt.ArrayLike,
    depths: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    attention: bool = True,
) -> tuple[Curve, Curve]:
    """The curve of one layer and of what is fixed, from measurements at one or several depths.

    Args:
        tokens, pairs, depths, values (`(num_points,)`):
            Sizes of the measured microbatches, layers that ran, and seconds (or bytes) measured. With depths of 0
            alone (a part without layers) everything is fixed.
        attention (`bool`, defaults to `True`): the layer depends on pairs too.

    Returns:
        `tuple[Curve, Curve]`: layer, fixed.

    Raises:
        ModelError: no points, or values that are not positive and finite.
    """
    count, squares, depth, value = (np.asarray(given, dtype=np.float64) for given in (tokens, pairs, depths, values))
    if not count.size or not (np.isfinite(value).all() and (value > 0).all() and (count > 0).all()):
        raise ModelError(f"a curve needs measured points of positive size and value; got {value.tolist()}.")
    length = squares / count
    layered = bool((depth > 0).any())
    token_knots = _knots(count)
    length_knots = _knots(length) if attention and layered else ()
    fixed_knots = token_knots if not layered else token_knots[-1:]
    ones = np.ones((count.size, 1))
    fixed = np.hstack([ones, _ramps(count, fixed_knots)])
    layer = np.zeros((count.size, 0))
    if layered:
        columns = [ones, _ramps(count, token_knots)]
        if length_knots:
            ends = np.asarray((*length_knots[:-1], np.inf))  # h is a sum of ramps that end at its knots
            columns.append(count[:, None] * np.minimum(length[:, None], ends))
        layer = depth[:, None] * np.hstack(columns)
    matrix = np.hstack([fixed, layer]) / value[:, None]
    pulls: list[FloatArray] = []
    at = 1
    if not layered:
        pulls += _pulls(matrix.shape[1], at, fixed_knots, count, value)
    at += len(fixed_knots)
    if layered:
        weight = value / np.maximum(depth, 1.0)
        pulls += _pulls(matrix.shape[1], at + 1, token_knots, count, weight)
        bends = at + 1 + len(token_knots)
        for index in range(len(length_knots) - 1):  # what a bend of h would move at its knot, relatively
            nearest = int(np.abs(np.log(length / length_knots[index])).argmin())
            row = np.zeros(matrix.shape[1])
            row[bends + index] = length_knots[index] * count[nearest] / weight[nearest]
            pulls.append(row)
    target = np.concatenate([np.ones(count.size), np.zeros(len(pulls))])
    full = np.vstack([matrix, *(_SMOOTHNESS * pull[None] for pull in pulls)])
    scale = np.linalg.norm(full, axis=0)
    scale[scale == 0] = 1.0
    found = nnls(full / scale, target) / scale
    fixed_curve = Curve(base=found[0], token_knots=fixed_knots, token_slopes=tuple(found[1:at]))
    if not layered:
        return Curve(), fixed_curve
    middle = at + 1 + len(token_knots)
    return (
        Curve(
            base=found[at],
            token_knots=token_knots,
            token_slopes=tuple(found[at + 1 : middle]),
            length_knots=length_knots or (1.0,),
            length_slopes=tuple(np.cumsum(found[middle:][::-1])[::-1]) if length_knots else (0.0,),
        ),
        fixed_curve,
    )


def _pulls(width: int, first: int, knots: Sequence[float], sizes: FloatArray, values: FloatArray) -> list[FloatArray]:
    """A row for each pair of neighbouring slopes: their difference × what it would move at the knot, relatively."""
    rows = []
    for index in range(len(knots) - 1):
        nearest = int(np.abs(np.log(sizes / knots[index + 1])).argmin())
        row: Any = np.zeros(width)
        row[first + index] = knots[index + 1] / values[nearest]
        row[first + index + 1] = -row[first + index]
        rows.append(row)
    return rows
