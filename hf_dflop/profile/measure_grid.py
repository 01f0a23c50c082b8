"""Which sizes to measure: few, then where the curve is known worst, then some at random that are never fitted.

In: the largest size and a function that measures one. Out: the sizes to measure next, one by one. Sizes lie on two
chains: one sequence of growing length, and growing numbers of short sequences (or of tiles, where all have one size).
After the first few of each chain, the next size is the middle of the interval beside the point that the other points
predict worst. It stops when the last sizes were predicted well before they were measured, or at a limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["Size", "first_sizes", "held_out_sizes", "next_size", "refine"]

_MIN_RATIO = 1.15
"""Sizes closer than this are not told apart."""


@dataclass(frozen=True, order=True, slots=True)
class Size:
    """A microbatch of equal sequences."""

    num_sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.num_sequences * self.length


def _spaced(low: int, high: int, count: int) -> list[int]:
    return sorted({round(value) for value in np.geomspace(low, max(high, low), count)})


def first_sizes(*, min_length: int, max_tokens: int, variable: bool) -> list[Size]:
    """Sizes to begin with: three lengths of one sequence, and three numbers of short (or fixed) sequences."""
    if not variable:
        return [Size(count, min_length) for count in _spaced(1, max(max_tokens // min_length, 1), 4)]
    alone = [Size(1, length) for length in _spaced(min_length, max_tokens, 4)]
    short = short_length(min_length, max_tokens)
    return sorted({*alone, *(Size(count, short) for count in _spaced(2, max(max_tokens // short, 2), 3))})


def short_length(min_length: int, max_tokens: int) -> int:
    """Length of the sequences of the second chain: long enough to be no launch overhead, short for attention."""
    return max(min_length, min(2 * min_length, max_tokens // 8))


def held_out_sizes(
    *, min_length: int, max_tokens: int, variable: bool, count: int, rng: np.random.Generator
) -> list[Size]:
    """Random sizes, log-uniform in tokens and in length; not those that were fitted unless sizes are few."""
    chosen: list[Size] = []
    for _ in range(count):
        tokens = float(np.exp(rng.uniform(np.log(min_length), np.log(max_tokens))))
        length = min_length
        if variable:
            length = int(np.exp(rng.uniform(np.log(min_length), np.log(max(tokens, min_length + 1)))))
        chosen.append(Size(max(round(tokens / length), 1), length))
    return chosen


def next_size(
    sizes: Sequence[Size], errors: Sequence[float], *, length_step: int = 1, taken: Sequence[Size] = ()
) -> Size | None:
    """The middle of the interval that is known worst; None where no interval is left to halve.

    Args:
        sizes: measured sizes.
        errors (`(num_sizes,)`): how far each is off when the others predict it.
        length_step (`int`, defaults to 1): lengths are multiples of this.
        taken: sizes that may not be chosen again.
    """
    candidates: list[tuple[float, Size]] = []
    lengths = {size.length for size in sizes}
    chains: list[list[int]] = [[i for i, size in enumerate(sizes) if size.num_sequences == 1]]
    chains += [[i for i, size in enumerate(sizes) if size.length == length] for length in lengths]
    for chain in chains:
        ordered = sorted(chain, key=lambda i: sizes[i].tokens)
        for low, high in pairwise(ordered):
            a, b = sizes[low], sizes[high]
            if b.tokens < _MIN_RATIO**2 * a.tokens:
                continue
            middle = float(np.sqrt(a.tokens * b.tokens))
            if a.length != b.length:
                between = Size(1, max(round(middle / length_step), 1) * length_step)
            else:
                between = Size(max(round(middle / a.length), 1), a.length)
            if between in (a, b) or between in taken:
                continue
            weight = np.log(b.tokens / a.tokens)
            candidates.append((max(errors[low], errors[high]) * float(weight), between))
    return max(candidates, key=lambda pair: (pair[0], pair[1]))[1] if candidates else None


def refine(
    first: Sequence[Size],
    measure: Callable[[Size], Size],
    error_before: Callable[[Size], float],
    left_out_errors: Callable[[Sequence[Size]], Sequence[float]],
    *,
    target: float,
    max_points: int,
    is_over: Callable[[], bool],
) -> list[float]:
    """Measure the first sizes, then add sizes until the curve is known well enough.

    Args:
        first: sizes to begin with.
        measure: measures a size and gives the size that it really had.
        error_before: how far the curve was from a size that was just measured, before it was fitted.
        left_out_errors: for measured sizes, the error of each when the others predict it.
        target (`float`): two sizes in a row predicted within this stop it.
        max_points (`int`): stop at so many sizes.
        is_over: the budget of seconds is used.

    Returns:
        `list[float]`: for each added size, how well it had been predicted.
    """
    sizes = [measure(size) for size in first]
    told: list[float] = []
    asked = list(first)
    while len(sizes) < max_points and not is_over():
        if len(told) >= 2 and max(told[-2:]) <= target:
            break
        size = next_size(sizes, left_out_errors(sizes), taken=(*asked, *sizes))
        if size is None:
            break
        asked.append(size)
        really = measure(size)
        told.append(error_before(really))
        sizes.append(really)
    return told
