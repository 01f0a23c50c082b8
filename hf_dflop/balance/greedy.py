"""Vector LPT: samples in descending order, each into the bucket whose largest component stays smallest.

Inputs: costs, caps and an order. Output: a bucket per sample, every bucket non-empty. Caps are respected where the
greedy can; where it cannot, it exceeds them as little as possible and the caller repairs.

Source: longest processing time first (Graham 1969), with the bucket chosen by its largest component after the
insertion. Costs are whole numbers held as float64, so all sums are exact.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# compiled functions: numba infers the types

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["lpt_orders", "vector_lpt"]


def lpt_orders(ticks: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Descending orders worth trying: by the largest component, by the sum, and by the largest share of a total.

    `ticks`: `(num_samples, num_components)`. Ties go by index. Orders that coincide are listed once.
    """
    totals = np.maximum(ticks.sum(axis=0), 1)
    keys = [ticks.max(axis=1), ticks.sum(axis=1), (ticks / totals).max(axis=1)]
    orders: list[npt.NDArray[np.int64]] = []
    for key in keys[: 1 if ticks.shape[1] == 1 else 3]:
        order = np.argsort(-key, kind="stable").astype(np.int64)
        if not any(np.array_equal(order, known) for known in orders):
            orders.append(order)
    return orders


@njit(cache=True, nogil=True)
def _sift(load, heap, size):
    """Let the root of a heap of buckets, ordered by (load, number), sink to its place."""
    at = 0
    held = heap[0]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size:
            a, b = heap[child], heap[child + 1]
            if load[b] < load[a] or (load[b] == load[a] and b < a):
                child += 1
        other = heap[child]
        if load[other] > load[held] or (load[other] == load[held] and other > held):
            break
        heap[at] = other
        at = child
    heap[at] = held


@njit(cache=True, nogil=True)
def _scalar_lpt(order, cost, num_buckets):
    """`vector_lpt` of one component, equal speeds and no caps, with the same result: the bucket is the emptiest, of
    equals the first, from a heap."""
    load = np.zeros(num_buckets)
    heap = np.arange(num_buckets)
    bucket = np.empty(order.size, dtype=np.int64)
    num_open = 0  # a bucket without a sample is never chosen before one with a smaller number
    for step in range(order.size):
        sample = order[step]
        if order.size - step <= num_buckets - num_open:  # the rest is just enough to fill the empty buckets
            b = np.int64(num_open)
        else:
            b = heap[0]
        if b == num_open:
            num_open += 1
        bucket[sample] = b
        load[b] += cost[sample]
        _sift(load, heap, num_buckets)
    return bucket


@njit(cache=True, nogil=True)
def _pair_lpt(order, costs, num_buckets):
    """`vector_lpt` of two components, equal speeds and no caps, with the same result."""
    first = np.zeros(num_buckets)
    second = np.zeros(num_buckets)
    bucket = np.empty(order.size, dtype=np.int64)
    num_open = 0  # as above: empty buckets are alike, and the first of equals is chosen
    for step in range(order.size):
        sample = order[step]
        a = costs[sample, 0]
        c = costs[sample, 1]
        best = num_open
        if order.size - step > num_buckets - num_open:
            best_peak = np.inf
            best_total = np.inf
            for b in range(num_buckets):
                x = first[b] + a
                y = second[b] + c
                peak = max(x, y)
                if peak < best_peak or (peak == best_peak and x + y < best_total):
                    best = b
                    best_peak = peak
                    best_total = x + y
        if best == num_open:
            num_open += 1
        bucket[sample] = best
        first[best] += a
        second[best] += c
    return bucket


@njit(cache=True, nogil=True)
def vector_lpt(order, costs, inverse_speed, weights, caps):
    """Bucket of each sample, `(num_samples,)` int64.

    `order` (num_samples,) int64; `costs` (num_samples, num_components) float64 whole numbers;
    `inverse_speed` (num_buckets,) float64; `weights` (num_samples, k) and `caps` (k,) int64.
    """
    num_samples, num_components = costs.shape
    num_buckets = inverse_speed.size
    num_caps = caps.size
    if num_caps == 0 and inverse_speed.min() == 1.0 and inverse_speed.max() == 1.0:
        if num_components == 1:
            return _scalar_lpt(order, costs[:, 0], num_buckets)
        if num_components == 2:
            return _pair_lpt(order, costs, num_buckets)
    load = np.zeros((num_buckets, num_components))
    used = np.zeros((num_buckets, num_caps), dtype=np.int64)
    count = np.zeros(num_buckets, dtype=np.int64)
    bucket = np.empty(num_samples, dtype=np.int64)
    num_empty = num_buckets
    for step in range(num_samples):
        sample = order[step]
        must_open = num_samples - step <= num_empty  # the rest is just enough to fill the empty buckets
        best = -1
        best_excess = np.int64(0)
        best_peak = 0.0
        best_total = 0.0
        for b in range(num_buckets):
            if must_open and count[b] > 0:
                continue
            excess = np.int64(0)
            for k in range(num_caps):
                before = max(np.int64(0), used[b, k] - caps[k])
                excess += max(np.int64(0), used[b, k] + weights[sample, k] - caps[k]) - before
            peak = 0.0
            total = 0.0
            for c in range(num_components):
                value = load[b, c] + costs[sample, c]
                total += value
                if value > peak:
                    peak = value
            peak *= inverse_speed[b]
            total *= inverse_speed[b]
            if (
                best < 0
                or excess < best_excess
                or (excess == best_excess and (peak < best_peak or (peak == best_peak and total < best_total)))
            ):
                best = b
                best_excess = excess
                best_peak = peak
                best_total = total
        if count[best] == 0:
            num_empty -= 1
        count[best] += 1
        bucket[sample] = best
        for c in range(num_components):
            load[best, c] += costs[sample, c]
        for k in range(num_caps):
            used[best, k] += weights[sample, k]
    return bucket
