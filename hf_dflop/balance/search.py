"""Local search on microbatches under the real objective, padding included.

Inputs: a microbatch (group) of each sample, ticks, caps. Output: the best grouping met, after a fixed number of
proposals. A proposal moves a sample, swaps two samples, or swaps two whole microbatches between their places; one
end of it is usually a microbatch that the objective waits for. It is accepted when the score rises by no more than
a threshold that falls to zero (threshold accepting, Dueck and Scheuer 1990: like annealing, without exponentials).

Score: objective + 0.1 × mean compute per rank, in whole numbers, so that padding shrinks where the objective alone
sees no difference. Exceeded caps go before the score: an excess may only fall. A negative cap is a floor.

The compiled functions are in one file on purpose: numba's cache on disk looks at a function's own file only, and
would not notice a change in another file that it was compiled with.

Memory grows with samples + groups, not with their product: the members of group g are `member[begin[g]:][:count[g]]`,
a run of one array, which moves to the array's free end where it has outgrown its room.

Layout: group g has the place (rank, slot) = (g mod num_ranks, g div num_ranks). On rank r a tick of cost takes
slowness[r] ÷ 2**SLOWNESS_BITS ticks of time, rounded up; the fastest rank has 2**SLOWNESS_BITS.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# compiled functions: numba infers the types

import numpy as np
from numba import njit

__all__ = ["SLOWNESS_BITS", "evaluate", "search"]

STEP, SLOT, STAGE, PIPELINE = 0, 1, 2, 3  # the order of objective.OBJECTIVES
SLOWNESS_BITS = 10  # the same as in problem.py


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
def _time(ticks, slowness, even):
    """What `ticks` of cost take on a rank; `even`: all ranks are of the usual speed (a loop without the product)."""
    return ticks if even else (ticks * slowness + (1 << SLOWNESS_BITS) - 1) >> SLOWNESS_BITS


@njit(cache=True, nogil=True)
def _slot_cost(s, v, lm, slowness, even, objective):
    most = np.int64(0)
    most_v = np.int64(0)
    num_ranks = slowness.size
    for r in range(num_ranks):
        g = s * num_ranks + r
        if objective == SLOT:
            most = max(most, _time(v[g] + lm[g], slowness[r], even))
        else:
            most = max(most, _time(lm[g], slowness[r], even))
            most_v = max(most_v, _time(v[g], slowness[r], even))
    return most + most_v


@njit(cache=True, nogil=True)
def _value(v, lm, slowness, even, objective):
    """Objective of the microbatch costs `v`, `lm` (num_groups,)."""
    value = np.int64(0)
    num_ranks = slowness.size
    if objective == STEP:
        for r in range(num_ranks):
            load = np.int64(0)
            for g in range(r, v.size, num_ranks):
                load += v[g] + lm[g]
            value = max(value, _time(load, slowness[r], even))
    elif objective == PIPELINE:
        for g in range(v.size):
            value = max(value, _time(max(v[g], lm[g]), slowness[g % num_ranks], even))
    else:
        for s in range(v.size // num_ranks):
            value += _slot_cost(s, v, lm, slowness, even, objective)
    return value


@njit(cache=True, nogil=True)
def _beyond(used, cap):
    """By how much a cap is exceeded; a negative one is a floor: at least -cap."""
    return max(np.int64(0), used - cap if cap >= 0 else -cap - used)


@njit(cache=True, nogil=True)
def _over(count, sums, largest, caps, padded_caps):
    """How much a microbatch exceeds its caps."""
    total = np.int64(0)
    for k in range(caps.size):
        total += _beyond(count * largest[k] if padded_caps[k] else sums[k], caps[k])
    return total


@njit(cache=True, nogil=True)
def _append(sample, g, member, begin, room, count, free):
    """Add a sample at the end of group g; `free` (1,): where `member` is free from. Returns its place in the group."""
    if count[g] == room[g]:
        wanted = 2 * count[g] + 2
        if free[0] + wanted > member.size:  # close the gaps that groups left behind when they moved
            old = member.copy()
            at = np.int64(0)
            for other in range(begin.size):
                first = begin[other]
                begin[other] = at
                room[other] = count[other]
                for x in range(count[other]):
                    member[at + x] = old[first + x]
                at += count[other]
            free[0] = at
        first = begin[g]
        begin[g] = free[0]
        room[g] = wanted
        for x in range(count[g]):
            member[free[0] + x] = member[first + x]
        free[0] += wanted
    member[begin[g] + count[g]] = sample
    count[g] += 1
    return count[g] - 1


@njit(cache=True, nogil=True)
def _group_cost(g, member, begin, count, vision, llm, weights, caps, padded_caps, padded):
    """(vision, LLM, excess over caps) of group g, from its members."""
    v = np.int64(0)
    total = np.int64(0)
    longest = np.int64(0)
    own = member[begin[g] : begin[g] + count[g]]
    for i in own:
        v += vision[i]
        total += llm[i]
        longest = max(longest, llm[i])
    excess = np.int64(0)
    for k in range(caps.size):
        used = np.int64(0)
        most = np.int64(0)
        for i in own:
            used += weights[i, k]
            most = max(most, weights[i, k])
        excess += _beyond(count[g] * most if padded_caps[k] else used, caps[k])
    return v, (count[g] * longest if padded else total), excess


@njit(cache=True, nogil=True)
def _changed(g, out, inn, count, v, lm, top, sums, tops, vision, llm, weights, caps, padded_caps, padded):
    """(vision, LLM, excess) of group g without sample `out` and with `inn` (-1: none)."""
    new_v = v[g]
    new_l = lm[g]
    n = count[g]
    if out >= 0:
        new_v -= vision[out]
        n -= 1
    if inn >= 0:
        new_v += vision[inn]
        n += 1
    if padded:
        longest = top[g, 0]
        if out >= 0 and llm[out] == longest:
            longest = top[g, 1]
        if inn >= 0:
            longest = max(longest, llm[inn])
        new_l = n * longest
    else:
        if out >= 0:
            new_l -= llm[out]
        if inn >= 0:
            new_l += llm[inn]
    excess = np.int64(0)
    for k in range(caps.size):
        if padded_caps[k]:
            most = tops[g, k, 0]
            if out >= 0 and weights[out, k] == most:
                most = tops[g, k, 1]
            if inn >= 0:
                most = max(most, weights[inn, k])
            used = n * most
        else:
            used = sums[g, k]
            if out >= 0:
                used -= weights[out, k]
            if inn >= 0:
                used += weights[inn, k]
        excess += _beyond(used, caps[k])
    return new_v, new_l, excess


@njit(cache=True, nogil=True)
def _rescan(g, member, begin, count, top, sums, tops, llm, weights):
    """Recompute the two largest lengths and weights of group g, and its sums of weights."""
    own = member[begin[g] : begin[g] + count[g]]
    top[g, 0] = 0
    top[g, 1] = 0
    for i in own:
        value = llm[i]
        if value > top[g, 0]:
            top[g, 1] = top[g, 0]
            top[g, 0] = value
        elif value > top[g, 1]:
            top[g, 1] = value
    for k in range(sums.shape[1]):
        sums[g, k] = 0
        tops[g, k, 0] = 0
        tops[g, k, 1] = 0
        for i in own:
            value = weights[i, k]
            sums[g, k] += value
            if value > tops[g, k, 0]:
                tops[g, k, 1] = tops[g, k, 0]
                tops[g, k, 0] = value
            elif value > tops[g, k, 1]:
                tops[g, k, 1] = value


@njit(cache=True, nogil=True)
def _slowest(v, lm, slowness, even, objective, random):
    """A group that the objective waits for."""
    num_groups = v.size
    num_ranks = slowness.size
    if objective == STEP:
        best = np.int64(-1)
        rank = 0
        for r in range(num_ranks):
            load = np.int64(0)
            for g in range(r, num_groups, num_ranks):
                load += v[g] + lm[g]
            load = _time(load, slowness[r], even)
            if load > best:
                best = load
                rank = r
        return rank + num_ranks * (_next(random) % (num_groups // num_ranks))
    first = np.int64(0)
    last = num_groups
    by_vision = _next(random) % 2 == 0
    if objective != PIPELINE:
        first = num_ranks * (_next(random) % (num_groups // num_ranks))
        last = first + num_ranks
    found = first
    best = np.int64(-1)
    for g in range(first, last):
        if objective == SLOT:
            value = v[g] + lm[g]
        elif objective == STAGE:
            value = v[g] if by_vision else lm[g]
        else:
            value = max(v[g], lm[g])
        value = _time(value, slowness[g % num_ranks], even)
        if value > best:
            best = value
            found = g
    return found


@njit(cache=True, nogil=True)
def evaluate(group, num_groups, slowness, vision, llm, weights, caps, padded_caps, padded, objective):
    """(excess over caps, objective, total compute) of a grouping."""
    v = np.zeros(num_groups, dtype=np.int64)
    lm = np.zeros(num_groups, dtype=np.int64)
    top = np.zeros(num_groups, dtype=np.int64)
    count = np.zeros(num_groups, dtype=np.int64)
    sums = np.zeros((num_groups, caps.size), dtype=np.int64)
    tops = np.zeros((num_groups, caps.size), dtype=np.int64)
    for i in range(group.size):
        g = group[i]
        count[g] += 1
        v[g] += vision[i]
        lm[g] += llm[i]
        top[g] = max(top[g], llm[i])
        for k in range(caps.size):
            sums[g, k] += weights[i, k]
            tops[g, k] = max(tops[g, k], weights[i, k])
    excess = np.int64(0)
    for g in range(num_groups):
        if padded:
            lm[g] = count[g] * top[g]
        excess += _over(count[g], sums[g], tops[g], caps, padded_caps)
    even = slowness.max() == 1 << SLOWNESS_BITS
    return excess, _value(v, lm, slowness, even, objective), v.sum() + lm.sum()


@njit(cache=True, nogil=True)
def search(
    group,
    num_groups,
    slowness,
    vision,
    llm,
    weights,
    caps,
    padded_caps,
    padded,
    objective,
    target,
    proposals,
    heat,
    mean_share,
    seed,
):
    """The best grouping found from `group` (num_samples,) int64; shapes as in the module's description.

    Score: objective × `mean_share` + total compute. Stops early at an objective <= `target` ticks without excess.
    `heat`: the first threshold, in ten-thousandths of the score.
    """
    n = group.size
    num_ranks = slowness.size
    even = slowness.max() == 1 << SLOWNESS_BITS
    count = np.bincount(group, minlength=num_groups)
    room = count.copy()
    begin = np.cumsum(count) - count
    member = np.empty(4 * n + 2 * num_groups + 2, dtype=np.int64)  # of a group that moves: twice its samples, and 2
    free = np.array([n])
    where = np.empty(n, dtype=np.int64)
    count[:] = 0
    group = group.copy()
    for i in range(n):
        where[i] = _append(i, group[i], member, begin, room, count, free)
    v = np.zeros(num_groups, dtype=np.int64)
    lm = np.zeros(num_groups, dtype=np.int64)
    over = np.zeros(num_groups, dtype=np.int64)
    top = np.zeros((num_groups, 2), dtype=np.int64)
    sums = np.zeros((num_groups, caps.size), dtype=np.int64)
    tops = np.zeros((num_groups, caps.size, 2), dtype=np.int64)
    for g in range(num_groups):
        _rescan(g, member, begin, count, top, sums, tops, llm, weights)
        v[g], lm[g], over[g] = _group_cost(g, member, begin, count, vision, llm, weights, caps, padded_caps, padded)
    random = np.empty(1, dtype=np.uint64)
    random[0] = np.uint64(seed)
    excess = over.sum()
    total = v.sum() + lm.sum()
    value = _value(v, lm, slowness, even, objective)
    score = value * mean_share + total
    best = group.copy()
    best_excess = excess
    best_score = score
    best_value = value
    first_heat = score // 10_000 * heat
    for turn in range(proposals):
        if best_excess == 0 and best_value <= target:
            break
        a = np.int64(-1)
        if excess > 0 and _next(random) % 4 != 0:  # a group above its caps
            start = _next(random) % num_groups
            for d in range(num_groups):
                if over[(start + d) % num_groups] > 0:
                    a = (start + d) % num_groups
                    break
        elif _next(random) % 4 != 0:
            a = _slowest(v, lm, slowness, even, objective, random)
        if a < 0:
            a = _next(random) % num_groups
        b = (a + 1 + _next(random) % (num_groups - 1)) % num_groups
        kind = _next(random) % 8
        i = np.int64(-1)
        j = np.int64(-1)
        if kind == 0:  # the two microbatches change places
            if objective == PIPELINE or (objective == STEP and a % num_ranks == b % num_ranks):
                continue
            new_va, new_la, new_oa = v[b], lm[b], over[b]
            new_vb, new_lb, new_ob = v[a], lm[a], over[a]
        else:
            i = member[begin[a] + _next(random) % count[a]]
            if kind < 4:
                if count[a] == 1:
                    continue
            else:
                j = member[begin[b] + _next(random) % count[b]]
            new_va, new_la, new_oa = _changed(
                a, i, j, count, v, lm, top, sums, tops, vision, llm, weights, caps, padded_caps, padded
            )
            new_vb, new_lb, new_ob = _changed(
                b, j, i, count, v, lm, top, sums, tops, vision, llm, weights, caps, padded_caps, padded
            )
        new_excess = excess - over[a] - over[b] + new_oa + new_ob
        if new_excess > excess:
            continue
        new_total = total - v[a] - lm[a] - v[b] - lm[b] + new_va + new_la + new_vb + new_lb
        old_va, old_la, old_vb, old_lb = v[a], lm[a], v[b], lm[b]
        slot_a = a // num_ranks
        slot_b = b // num_ranks
        incremental = objective in (SLOT, STAGE)
        new_value = value
        if incremental:
            new_value -= _slot_cost(slot_a, v, lm, slowness, even, objective)
            if slot_b != slot_a:
                new_value -= _slot_cost(slot_b, v, lm, slowness, even, objective)
        v[a], lm[a], v[b], lm[b] = new_va, new_la, new_vb, new_lb
        if incremental:
            new_value += _slot_cost(slot_a, v, lm, slowness, even, objective)
            if slot_b != slot_a:
                new_value += _slot_cost(slot_b, v, lm, slowness, even, objective)
        else:
            new_value = _value(v, lm, slowness, even, objective)
        new_score = new_value * mean_share + new_total
        threshold = first_heat // proposals * (proposals - turn)
        if new_excess == excess and new_score > score + threshold:
            v[a], lm[a], v[b], lm[b] = old_va, old_la, old_vb, old_lb
            continue
        if kind == 0:
            begin[a], begin[b] = begin[b], begin[a]
            room[a], room[b] = room[b], room[a]
            count[a], count[b] = count[b], count[a]
            group[member[begin[a] : begin[a] + count[a]]] = a
            group[member[begin[b] : begin[b] + count[b]]] = b
        else:
            last = member[begin[a] + count[a] - 1]
            member[begin[a] + where[i]] = last
            where[last] = where[i]
            count[a] -= 1
            if j >= 0:
                last = member[begin[b] + count[b] - 1]
                member[begin[b] + where[j]] = last
                where[last] = where[j]
                count[b] -= 1
                where[j] = _append(j, a, member, begin, room, count, free)
                group[j] = a
            where[i] = _append(i, b, member, begin, room, count, free)
            group[i] = b
        _rescan(a, member, begin, count, top, sums, tops, llm, weights)
        _rescan(b, member, begin, count, top, sums, tops, llm, weights)
        over[a], over[b] = new_oa, new_ob
        excess = new_excess
        total = new_total
        value = new_value
        score = new_score
        if excess < best_excess or (excess == best_excess and score < best_score):
            best_excess = excess
            best_score = score
            best_value = value
            best[:] = group
    return best
