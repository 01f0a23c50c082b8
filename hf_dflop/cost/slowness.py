"""Which ranks take longer than others for the same work.

Input: for every measured microbatch its rank, and measured ÷ predicted seconds. Output: a factor per rank, 1 for the
usual one, that is followed over time and trusted only when it is seen in two updates one after the other.

Assumptions: what is predicted is right up to a factor that all ranks share; every rank gets a mixture of samples, so
that an error in one module does not look like a slow rank.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["RankSpeeds", "watch"]

SLOW_FROM = 1.10
"""A rank is called slow from this factor."""
SLOW_UNTIL = 1.06
"""A slow rank is called so until its factor falls below this."""
EVEN_WITHIN = 0.04
"""Ranks closer than this to the usual one count as equally fast."""
MIN_MICROBATCHES = 3
_MEMORY_STEPS = 16
_SURE = 3.0
"""Standard errors that a factor must stand out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpeeds:
    """How much longer than the usual rank each takes; `num_seen[r]` updates in a row say that rank r is slow."""

    slowness: tuple[float, ...]
    num_seen: tuple[int, ...]

    @classmethod
    def even(cls, num_ranks: int) -> "RankSpeeds":
        """All ranks equally fast, as far as is known."""
        return cls(slowness=(1.0,) * num_ranks, num_seen=(0,) * num_ranks)

    @property
    def slow_ranks(self) -> tuple[int, ...]:
        """Ranks that are surely slow, the slowest first."""
        found = [r for r, seen in enumerate(self.num_seen) if seen >= 2 and self.slowness[r] >= SLOW_UNTIL]
        return tuple(sorted(found, key=lambda r: (-self.slowness[r], r)))

    @property
    def speeds(self) -> tuple[float, ...] | None:
        """Relative speeds to balance with; None when no rank stands out."""
        if not self.slow_ranks:
            return None
        # Steps of 1/64: a wobble of the measurement is no reason for another version.
        steps = [round(64 * s) / 64 if abs(s - 1.0) > EVEN_WITHIN else 1.0 for s in self.slowness]
        return tuple(1.0 / min(max(s, 0.5), 3.0) for s in steps)


def watch(before: RankSpeeds, rank: npt.NDArray[np.int64], ratio: npt.NDArray[np.float64], steps: int) -> RankSpeeds:
    """Follow the ranks' factors with the microbatches of `steps` more steps.

    Args:
        rank (`(num_microbatches,)` int64), ratio (`(num_microbatches,)` float64): measured ÷ predicted seconds.
    """
    num_ranks = len(before.slowness)
    middle, error = [float("nan")] * num_ranks, [float("nan")] * num_ranks
    for r in range(num_ranks):
        own = ratio[rank == r]
        if own.size >= MIN_MICROBATCHES:
            middle[r] = float(np.median(own))
            error[r] = 1.86 * float(np.median(np.abs(own - middle[r]))) / math.sqrt(own.size)
    known = sorted(value for value in middle if value == value)
    if len(known) < 2:
        return before
    usual = known[(len(known) - 1) // 2]  # of two ranks the faster one
    keep = 1.0
    for _ in range(steps):
        keep *= 1.0 - 1.0 / _MEMORY_STEPS
    slowness, seen = [], []
    for r, old in enumerate(before.slowness):
        if middle[r] != middle[r]:
            slowness.append(old)
            seen.append(before.num_seen[r])
            continue
        found = middle[r] / usual
        is_slow = found >= SLOW_FROM and found - 1.0 > _SURE * error[r] / usual
        # A rank that changes at once is followed at once, when it is seen for the second time.
        fresh = is_slow and before.num_seen[r] == 1
        smooth = found if fresh else old * keep + found * (1.0 - keep)
        slowness.append(smooth)
        # Few microbatches may leave it open; a rank that was surely slow stays so until it is seen to be fast again.
        is_open = found >= SLOW_FROM or (before.num_seen[r] >= 2 and smooth >= SLOW_UNTIL)
        seen.append(before.num_seen[r] + 1 if is_slow else before.num_seen[r] if is_open else 0)
    return RankSpeeds(slowness=tuple(slowness), num_seen=tuple(seen))
