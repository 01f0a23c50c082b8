"""Checks of what callers hand in: costs, speeds and caps, with errors that name the sample and the numbers."""

from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.ticks import checked_seconds
from hf_dflop.errors import BalanceError

__all__ = ["checked_caps", "checked_costs", "checked_counts", "checked_slowness", "checked_speeds"]

MAX_COMPONENTS = 3
MAX_SPEED_RATIO = 8.0


def checked_costs(costs: Any) -> npt.NDArray[np.float64]:
    """`costs` as `(num_samples, num_components)` float64 seconds; one dimension means one component."""
    seconds = checked_seconds(costs, "costs")
    if seconds.ndim == 1:
        seconds = seconds[:, None]
    if seconds.ndim != 2 or not 1 <= seconds.shape[1] <= MAX_COMPONENTS:
        raise BalanceError(
            f"costs has shape {np.shape(costs)}; expected (num_samples, num_components) with 1 to "
            f"{MAX_COMPONENTS} components"
        )
    return seconds


def checked_speeds(speeds: Any, num_buckets: int) -> npt.NDArray[np.float64]:
    """1 ÷ speed of each bucket, `(num_buckets,)`; ones when `speeds` is None."""
    if num_buckets < 1:
        raise BalanceError(f"num_buckets is {num_buckets}; at least 1 bucket is needed")
    if speeds is None:
        return np.ones(num_buckets)
    array = checked_seconds(speeds, "speeds")
    if array.shape != (num_buckets,):
        raise BalanceError(
            f"speeds has shape {array.shape}; expected ({num_buckets},), one per bucket of num_buckets={num_buckets}"
        )
    if float(array.min()) <= 0:
        raise BalanceError(
            f"speeds is 0 at bucket {int(array.argmin())}; a speed must be > 0. Leave that bucket out instead."
        )
    return 1.0 / array


def checked_slowness(speeds: Any, num_ranks: int, bits: int) -> npt.NDArray[np.int64]:
    """1 ÷ speed of each rank in 2**-bits of the fastest rank's, `(num_ranks,)`; equal when `speeds` is None."""
    inverse = checked_speeds(speeds, num_ranks)
    inverse = inverse / inverse.min()
    if float(inverse.max()) > MAX_SPEED_RATIO:
        raise BalanceError(
            f"rank {int(inverse.argmax())} is {float(inverse.max()):.3g} times slower than the fastest; a ratio of at "
            f"most {MAX_SPEED_RATIO:.0f} can be balanced. Leave that rank out, or repair it."
        )
    return np.rint(np.ldexp(inverse, bits)).astype(np.int64)


def checked_counts(counts: Any, name: str, num_samples: int) -> npt.NDArray[np.int64]:
    """`counts` as `(num_samples, ...)` int64, whole and >= 0."""
    array = np.asarray(counts)
    if array.shape[:1] != (num_samples,):
        raise BalanceError(
            f"{name} has shape {array.shape} but there are {num_samples} samples; give one row per sample"
        )
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise BalanceError(f"{name} has dtype {array.dtype}; expected whole numbers")
    whole = array.astype(np.int64) if np.isfinite(array).all() else None
    if whole is None or (whole != array).any() or (array < 0).any():
        raise BalanceError(f"{name} must hold finite whole numbers >= 0, such as tokens or patches")
    if whole.size and int(whole.max()) > 2**40:
        raise BalanceError(f"{name} holds {int(whole.max())}; counts above 2**40 are not supported")
    return whole


def checked_caps(weights: Any, caps: Any, num_samples: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`(num_samples, k)` weights and `(k,)` caps, k = 0 when none are given; no sample alone exceeds a cap."""
    if (weights is None) != (caps is None):
        given, missing = ("caps", "weights") if weights is None else ("weights", "caps")
        raise BalanceError(f"{given} was given without {missing}; give both or neither")
    if weights is None:
        return np.zeros((num_samples, 0), dtype=np.int64), np.zeros(0, dtype=np.int64)
    whole = checked_counts(weights, "weights", num_samples)
    whole = whole[:, None] if whole.ndim == 1 else whole
    limits = np.atleast_1d(np.asarray(caps))
    if whole.ndim != 2 or limits.shape != (whole.shape[1],):
        raise BalanceError(
            f"caps has shape {limits.shape} and weights {whole.shape}; expected (k,) and (num_samples, k)"
        )
    limits = checked_counts(limits, "caps", whole.shape[1])
    over = whole > limits
    if over.any():
        sample, column = (int(axis[0]) for axis in np.nonzero(over))
        raise BalanceError(
            f"sample {sample} has weight {whole[sample, column]} in column {column}, above the cap of "
            f"{limits[column]} per bucket: no bucket can hold it. Raise the cap, or shorten or drop the sample."
        )
    return whole, limits
