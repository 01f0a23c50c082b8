"""Groups for a padding collator: runs of samples sorted by length, where little is padded.

Inputs: samples' LLM and vision ticks and a number of groups. Outputs: groupings to start a search from, and the least
padded cost that any grouping can have, for the bound.

For a given number of groups the sum of (count × longest) is least for runs of the order by length: swapping a longer
sample of one group for a shorter one of a group with a larger maximum never raises either maximum. The cost of a
run from i to j satisfies the quadrangle inequality, so the best cuts are monotone and a divide-and-conquer dynamic
program finds them in num_groups · num_samples · log(num_samples).
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# compiled functions: numba infers the types

import numpy as np
from numba import njit

__all__ = ["even_runs", "least_padding"]


@njit(cache=True, nogil=True)
def least_padding(length, num_groups):
    """Group of each sample for the least sum of count × longest, and that sum.

    `length` (num_samples,) int64, descending. Returns `(group, total)`; groups are numbered along `length`.
    """
    n = length.size
    infinite = np.int64(2**62)
    cost = np.full(n + 1, infinite, dtype=np.int64)  # of the first i samples in the groups so far
    cost[0] = 0
    cut = np.zeros((num_groups + 1, n + 1), dtype=np.int32)
    stack = np.empty((64, 4), dtype=np.int64)
    for g in range(1, num_groups + 1):
        new = np.full(n + 1, infinite, dtype=np.int64)
        depth = 1
        stack[0] = np.array((g, n, g - 1, n - 1))
        while depth > 0:  # every entry: ends low..high, whose best start lies in first..last
            depth -= 1
            low, high, first, last = stack[depth]
            if low > high:
                continue
            end = (low + high) // 2
            best_start = first
            for begin in range(first, min(last, end - 1) + 1):
                if cost[begin] == infinite:
                    continue
                value = cost[begin] + (end - begin) * length[begin]
                if value < new[end]:
                    new[end] = value
                    best_start = begin
            cut[g, end] = best_start
            stack[depth] = np.array((low, end - 1, first, best_start))
            stack[depth + 1] = np.array((end + 1, high, best_start, last))
            depth += 2
        cost = new
    group = np.empty(n, dtype=np.int64)
    end = n
    for g in range(num_groups, 0, -1):
        begin = cut[g, end]
        group[begin:end] = g - 1
        end = begin
    return group, cost[n]


@njit(cache=True, nogil=True)
def _fill(length, vision, weights, caps, padded_caps, limit, num_groups, group):
    """Fill runs up to `limit` each; returns the number of runs, or num_groups + 1 when they are too many."""
    used = np.zeros(caps.size, dtype=np.int64)
    most = np.zeros(caps.size, dtype=np.int64)
    current = np.int64(-1)
    begin = 0
    vision_sum = np.int64(0)
    for i in range(length.size):
        fits = current >= 0 and vision_sum + vision[i] + (i - begin + 1) * length[begin] <= limit
        for k in range(caps.size):
            if padded_caps[k]:
                fits = fits and (i - begin + 1) * max(most[k], weights[i, k]) <= caps[k]
            else:
                fits = fits and used[k] + weights[i, k] <= caps[k]
        if not fits:
            current += 1
            if current >= num_groups:
                return num_groups + 1
            begin = i
            vision_sum = np.int64(0)
            used[:] = 0
            most[:] = 0
        group[i] = current
        vision_sum += vision[i]
        for k in range(caps.size):
            used[k] += weights[i, k]
            most[k] = max(most[k], weights[i, k])
    return current + 1


@njit(cache=True, nogil=True)
def even_runs(length, vision, weights, caps, padded_caps, num_groups):
    """Runs of the order by length whose most expensive one is cheapest, within the caps where runs can be.

    `length`, `vision` (num_samples,) int64 in descending order of length; `weights` (num_samples, k) and `caps` (k,)
    int64; `padded_caps` (k,) bool: the column counts as count × largest. Returns the group of each sample.
    """
    n = length.size
    group = np.empty(n, dtype=np.int64)
    low = np.int64(0)
    high = n * length[0] + vision.sum()
    if _fill(length, vision, weights, caps, padded_caps, high, num_groups, group) > num_groups:
        return np.arange(n) * num_groups // n  # no runs fit the caps: equal counts, for the search to repair
    while low < high:
        middle = (low + high) // 2
        if _fill(length, vision, weights, caps, padded_caps, middle, num_groups, group) <= num_groups:
            high = middle
        else:
            low = middle + 1
    used = _fill(length, vision, weights, caps, padded_caps, high, num_groups, group)
    count = np.zeros(num_groups, dtype=np.int64)
    for i in range(n):
        count[group[i]] += 1
    while used < num_groups:  # halve the fullest run until every group has one
        fullest = np.argmax(count)
        keep = count[fullest] // 2
        seen = 0
        for i in range(n):
            if group[i] == fullest:
                seen += 1
                if seen > keep:
                    group[i] = used
        count[used] = count[fullest] - keep
        count[fullest] = keep
        used += 1
    return group
