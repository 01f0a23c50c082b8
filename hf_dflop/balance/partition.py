"""Partition samples into buckets so that the largest component of the fullest bucket is smallest.

Inputs: seconds of each sample in 1 to 3 components (vision, LLM, ...), a number of buckets, caps. Output: a bucket
per sample and how far from the best it can be at most.

Method: vector LPT in up to three orders, the best of them improved by moves and swaps out of the worst bucket, then
by kicks, until a limit on work. Source: DFLOP balances microbatches by minimising the largest of their stage times
(arXiv 2603.25120) with a time-limited solver; a work limit gives every rank the same answer.

Assumptions: the load of a bucket is the sum of its samples' costs (no padding; see `assign` for that).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.bound import bound_ticks
from hf_dflop.balance.checks import checked_caps, checked_costs, checked_speeds
from hf_dflop.balance.seed import seed_state
from hf_dflop.balance.ticks import to_seconds, to_ticks
from hf_dflop.errors import BalanceError

__all__ = ["Partition", "partition", "partition_ticks"]

WORK_PER_SAMPLE = 1_600
"""Pairs of samples evaluated at most, per sample: about 3 ms for 512 samples on one core."""
GOOD_ENOUGH = 1.0005
"""The search stops at a load this close to the bound."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Partition:
    """Samples in buckets."""

    bucket: npt.NDArray[np.int64]
    """Bucket of each sample, `(num_samples,)`."""
    load: float
    """Largest component of the fullest bucket, seconds (÷ the bucket's speed)."""
    bound: float
    """Seconds that no partition can go below."""

    @property
    def gap(self) -> float:
        """load ÷ bound - 1: how far from the best the load is at most; 0 when all costs are 0."""
        return self.load / self.bound - 1.0 if self.bound > 0 else 0.0


def partition(
    costs: Any,
    num_buckets: int,
    *,
    speeds: Any = None,
    weights: Any = None,
    caps: Any = None,
    seed: int = 0,
    kicks: int | None = None,
) -> Partition:
    """Spread samples over buckets so that the largest component of the fullest bucket is smallest.

    A pure function of its arguments, the same on every platform; ties go by index.

    Args:
        costs (`npt.ArrayLike`):
            `(num_samples, num_components)` seconds, 1 to 3 components; `(num_samples,)` means one.
        num_buckets (`int`):
            At least 1, at most `num_samples`. Every bucket gets a sample.
        speeds (`npt.ArrayLike`, *optional*):
            `(num_buckets,)` relative speeds > 0; a bucket's load is cost ÷ speed.
        weights (`npt.ArrayLike`, *optional*):
            `(num_samples, k)` whole numbers that caps limit, such as patches and tokens.
        caps (`npt.ArrayLike`, *optional*):
            `(k,)` largest sum of weights in a bucket; never exceeded.
        seed (`int`, *optional*, defaults to 0):
            Seed of the search.
        kicks (`int`, *optional*):
            Restarts out of a local optimum at most; 0 only descends. By default the limit on work ends the search.

    Returns:
        `Partition`: the buckets, their largest load and the bound.

    Raises:
        BalanceError: costs, speeds, weights or caps that are not usable, fewer samples than buckets, a sample above
            a cap, or caps that no partition was found to satisfy.

    Example:
        Two components: neither bucket may hold both samples that are slow in the same module.

        >>> partition([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]], 2).load
        3.0
    """
    seconds = checked_costs(costs)
    num_samples = len(seconds)
    inverse_speed = checked_speeds(speeds, num_buckets)
    if num_samples < num_buckets:
        raise BalanceError(
            f"{num_samples} samples cannot fill {num_buckets} buckets; every bucket needs a sample. "
            "Use fewer buckets or more samples."
        )
    whole_weights, whole_caps = checked_caps(weights, caps, num_samples)
    ticks, bits = to_ticks(seconds, num_terms=num_samples, largest=float(seconds.max()))
    bound = bound_ticks(ticks, inverse_speed)
    bucket, load = partition_ticks(ticks, inverse_speed, whole_weights, whole_caps, bound, seed, kicks)
    return Partition(bucket=bucket, load=to_seconds(load, bits), bound=to_seconds(bound, bits))


def partition_ticks(
    ticks: npt.NDArray[np.int64],
    inverse_speed: npt.NDArray[np.float64],
    weights: npt.NDArray[np.int64],
    caps: npt.NDArray[np.int64],
    bound: float,
    seed: int,
    kicks: int | None,
) -> tuple[npt.NDArray[np.int64], float]:
    """`partition` on checked arrays: the bucket of each sample, and the largest load in ticks."""
    from hf_dflop.balance.descent import improve
    from hf_dflop.balance.greedy import lpt_orders, vector_lpt

    costs = ticks.astype(np.float64)
    target = bound * GOOD_ENOUGH
    orders = lpt_orders(ticks)
    if caps.size:  # large weights first: the order most likely to fit
        orders.append(np.argsort(-(weights / np.maximum(caps, 1)).max(axis=1), kind="stable").astype(np.int64))
    state = seed_state(seed)
    work = WORK_PER_SAMPLE * len(ticks)
    best: tuple[int, float, npt.NDArray[np.int64]] | None = None
    for order in orders:
        bucket = vector_lpt(order, costs, inverse_speed, weights, caps)
        # no work: only evaluate
        excess, peak, _ = improve(bucket, costs, inverse_speed, weights, caps, target, 0, 0, state)
        if best is None or (excess, peak) < best[:2]:
            best = (excess, peak, bucket)
    assert best is not None
    excess, peak, bucket = best
    if excess or peak > target:
        limit = work if kicks is None else kicks  # no more kicks than work
        excess, peak, _ = improve(bucket, costs, inverse_speed, weights, caps, target, limit, work, state)
    if excess:
        totals = [
            f"column {k}: {int(weights[:, k].sum())} in all, {int(caps[k])} x {inverse_speed.size} "
            f"buckets = {int(caps[k]) * inverse_speed.size}"
            for k in range(caps.size)
        ]
        raise BalanceError(
            f"no partition into {inverse_speed.size} buckets within the caps was found ({'; '.join(totals)}). "
            "Raise the caps or use more buckets."
        )
    return bucket, float(peak)
