"""Local search on a partition: moves and swaps out of the worst bucket, then kicks out of the local optimum.

Inputs: a partition with its costs and caps. Output: a partition that is no worse, within a limit on work (pairs of
samples evaluated). There is no time limit: ranks of different speed must stop at the same partition.

While a cap is exceeded, the worst bucket is the one that exceeds its caps most and the search lowers the excess;
afterwards it is the one with the largest load, and no step may exceed a cap again.

Assumptions: costs are whole numbers held as float64, so every sum is exact and undoing a step restores its state.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# compiled functions: numba infers the types

import numpy as np
from numba import njit

__all__ = ["improve"]


@njit(cache=True, nogil=True)
def _next(state):
    """A pseudo-random whole number in [0, 2**31); `state` (1,) uint64 is advanced (xorshift64)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64(x >> np.uint64(33))


@njit(cache=True, nogil=True)
def _excess(b, used, caps):
    total = np.int64(0)
    for k in range(caps.size):
        total += max(np.int64(0), used[b, k] - caps[k])
    return total


@njit(cache=True, nogil=True)
def _transfer(sample, b, bucket, costs, weights, load, used, member, count, where):
    """Move `sample` from its bucket to bucket `b`."""
    a = bucket[sample]
    last = member[a, count[a] - 1]
    member[a, where[sample]] = last
    where[last] = where[sample]
    count[a] -= 1
    member[b, count[b]] = sample
    where[sample] = count[b]
    count[b] += 1
    bucket[sample] = b
    for c in range(costs.shape[1]):
        load[a, c] -= costs[sample, c]
        load[b, c] += costs[sample, c]
    for k in range(weights.shape[1]):
        used[a, k] -= weights[sample, k]
        used[b, k] += weights[sample, k]


@njit(cache=True, nogil=True)
def _best_step(w, t, costs, inverse, weights, caps, load, used, member, count, limit_excess, limit):
    """Best move (j = -1) or swap between buckets w and t that beats (limit_excess, limit).

    Returns (i, j, excess, peak); i = -1 when there is none.
    """
    num_components = costs.shape[1]
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    best_excess = limit_excess
    best = limit
    for x in range(count[w]):
        i = member[w, x]
        for y in range(-1 if count[w] > 1 else 0, count[t]):
            j = member[t, y] if y >= 0 else np.int64(-1)
            peak_w = 0.0
            peak_t = 0.0
            for c in range(num_components):
                change = costs[i, c]
                if j >= 0:
                    change -= costs[j, c]
                peak_w = max(peak_w, load[w, c] - change)
                peak_t = max(peak_t, load[t, c] + change)
            peak = max(peak_w * inverse[w], peak_t * inverse[t])
            if best_excess == 0 and peak >= best:
                continue
            excess = np.int64(0)
            for k in range(caps.size):
                shift = weights[i, k]
                if j >= 0:
                    shift -= weights[j, k]
                excess += max(np.int64(0), used[w, k] - shift - caps[k])
                excess += max(np.int64(0), used[t, k] + shift - caps[k])
            if excess < best_excess or (excess == best_excess and peak < best):
                best_i = i
                best_j = j
                best_excess = excess
                best = peak
    return best_i, best_j


@njit(cache=True, nogil=True)
def _best_step_of_pairs(w, t, costs, inverse, load, member, count, near, limit):
    """`_best_step` of two components without caps, with the same result; `near` (2, >= samples of t): scratch."""
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    best = limit
    inverse_w = inverse[w]
    inverse_t = inverse[t]
    num_near = count[t]
    for y in range(num_near):
        j = member[t, y]
        near[0, y] = costs[j, 0]
        near[1, y] = costs[j, 1]
    for x in range(count[w]):
        i = member[w, x]
        left_0 = load[w, 0] - costs[i, 0]
        left_1 = load[w, 1] - costs[i, 1]
        joined_0 = load[t, 0] + costs[i, 0]
        joined_1 = load[t, 1] + costs[i, 1]
        if count[w] > 1:
            peak = max(max(left_0, left_1) * inverse_w, max(joined_0, joined_1) * inverse_t)
            if peak < best:
                best_i = i
                best_j = np.int64(-1)
                best = peak
        for y in range(num_near):
            a = near[0, y]
            b = near[1, y]
            peak = max(max(left_0 + a, left_1 + b) * inverse_w, max(joined_0 - a, joined_1 - b) * inverse_t)
            if peak < best:
                best_i = i
                best_j = member[t, y]
                best = peak
    return best_i, best_j


@njit(cache=True, nogil=True)
def _worst(load, used, inverse, caps):
    """The worst bucket, the total excess over caps and the largest load."""
    worst = 0
    peak = -1.0
    worst_over = 0
    over_most = np.int64(0)
    total = np.int64(0)
    for b in range(inverse.size):
        value = 0.0
        for c in range(load.shape[1]):
            value = max(value, load[b, c])
        value *= inverse[b]
        if value > peak:
            peak = value
            worst = b
        if caps.size:
            over = _excess(b, used, caps)
            total += over
            if over > over_most:
                over_most = over
                worst_over = b
    return (worst_over if total > 0 else worst), total, peak


@njit(cache=True, nogil=True)
def improve(bucket, costs, inverse, weights, caps, target, kicks, work, seed):
    """Improve `bucket` (num_samples,) in place; returns (total excess over caps, largest load, work done).

    Shapes as in `greedy.vector_lpt`. Stops at a largest load <= `target`, after `kicks` kicks in vain or otherwise,
    or after `work` evaluated pairs.
    """
    num_samples = costs.shape[0]
    num_buckets = inverse.size
    room = num_samples - num_buckets + 2  # one more than the fullest bucket: a swap adds before it removes
    load = np.zeros((num_buckets, costs.shape[1]))
    used = np.zeros((num_buckets, caps.size), dtype=np.int64)
    count = np.zeros(num_buckets, dtype=np.int64)
    member = np.empty((num_buckets, room), dtype=np.int64)
    where = np.empty(num_samples, dtype=np.int64)
    pairs = costs.shape[1] == 2 and caps.size == 0
    near = np.empty((2, room if pairs else 0))
    for i in range(num_samples):
        b = bucket[i]
        member[b, count[b]] = i
        where[i] = count[b]
        count[b] += 1
        for c in range(costs.shape[1]):
            load[b, c] += costs[i, c]
        for k in range(caps.size):
            used[b, k] += weights[i, k]
    random = np.empty(1, dtype=np.uint64)
    random[0] = np.uint64(seed)
    log_sample = np.empty(8 * num_samples + 64, dtype=np.int64)  # what to undo when a kick was in vain
    log_bucket = np.empty(8 * num_samples + 64, dtype=np.int64)
    logged = 0
    kick = 0
    done = np.int64(0)
    best_excess = np.int64(0)
    best_peak = -1.0
    while True:
        # descend to a local optimum
        while done < work and logged < log_sample.size - 16:
            w, excess, peak = _worst(load, used, inverse, caps)
            done += num_buckets
            if excess == 0 and peak <= target:
                break
            w_excess = _excess(w, used, caps)
            start = _next(random) % num_buckets
            found = False
            for d in range(num_buckets):
                t = (start + d) % num_buckets
                if t == w:
                    continue
                if pairs:
                    i, j = _best_step_of_pairs(w, t, costs, inverse, load, member, count, near, peak)
                else:
                    limit_excess = w_excess + _excess(t, used, caps)
                    i, j = _best_step(
                        w,
                        t,
                        costs,
                        inverse,
                        weights,
                        caps,
                        load,
                        used,
                        member,
                        count,
                        limit_excess,
                        peak if excess == 0 else -1.0,
                    )
                done += count[w] * (count[t] + 1)
                if i >= 0:
                    log_sample[logged] = i
                    log_bucket[logged] = w
                    logged += 1
                    _transfer(i, t, bucket, costs, weights, load, used, member, count, where)
                    if j >= 0:
                        log_sample[logged] = j
                        log_bucket[logged] = t
                        logged += 1
                        _transfer(j, w, bucket, costs, weights, load, used, member, count, where)
                    found = True
                    break
            if not found:
                break
        w, excess, peak = _worst(load, used, inverse, caps)
        worse = best_peak >= 0 and (excess > best_excess or (excess == best_excess and peak > best_peak))
        if worse:
            while logged > 0:
                logged -= 1
                _transfer(
                    log_sample[logged], log_bucket[logged], bucket, costs, weights, load, used, member, count, where
                )
        else:
            best_excess = excess
            best_peak = peak
        logged = 0
        if (best_excess == 0 and best_peak <= target) or kick >= kicks or done >= work or num_buckets < 2:
            return best_excess, best_peak, done
        # kick: a few random exchanges between the worst bucket and one other
        kick += 1
        w, excess, peak = _worst(load, used, inverse, caps)
        t = (w + 1 + _next(random) % (num_buckets - 1)) % num_buckets
        for _ in range(1 + _next(random) % 3):
            i = member[w, _next(random) % count[w]]
            j = member[t, _next(random) % count[t]]
            log_sample[logged] = i
            log_bucket[logged] = w
            log_sample[logged + 1] = j
            log_bucket[logged + 1] = t
            logged += 2
            _transfer(i, t, bucket, costs, weights, load, used, member, count, where)
            _transfer(j, w, bucket, costs, weights, load, used, member, count, where)
            done += num_buckets
