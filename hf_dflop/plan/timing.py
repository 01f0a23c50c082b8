"""The compiled heart of the simulator: when does each action of a step end, and which order of microbatches is quick.

In: actions in an order in which each stands after all that it waits for, seconds as arrays. Out: ends, or the step's
seconds. No objects, one pass, about 10 ns per action and replica.

Numbers of kinds: 0 F, 1 B, 2 I, 3 W. All arrays of seconds are `(..., num_stages, num_replicas, num_microbatches)`
with as many replicas as the stage with the most has; a stage uses the first of its own.

The compiled functions are in one file on purpose: numba's cache on disk looks at a function's own file only.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# compiled functions: numba infers the types

import numpy as np
from numba import njit

__all__ = ["batch", "greedy", "improve", "line_up", "run", "step_s"]


@njit(cache=True, nogil=True)
def run(
    stage,
    kind,
    microbatch,
    stage_rank,
    num_replicas,
    first_backward,
    seconds,
    transfer,
    data_ready,
    floor,
    lockstep,
    bridge,
    forward_from,
    backward_from,
    position,
    start,
    end,
    free,
):
    """Time every action; fills `start`, `end` and `free`.

    Args:
        stage, kind, microbatch: `(num_actions,)` int64, each action after what it waits for.
        stage_rank, num_replicas: `(num_stages,)` int64.
        first_backward: stages before it have no backward.
        seconds: `(4, S, R, M)`. transfer: `(2, S, R, M)`, from the stage forward (0) and back (1).
        data_ready: `(R, M)`, when the first stage's m-th input is there.
        floor: `(4, S)`, the least that an action takes.
        lockstep: replicas that run each action together (1: none).
        bridge: the stage whose replicas feed another number of replicas of the next; -1: none.
        forward_from: `(R, M, 2)` int64, first and last + 1 replica of stage `bridge` that feed a replica of the next.
        backward_from: `(R, M, 2)`, the same from the stage after the bridge back to it.
        position: `(M,)`, which microbatch's seconds the m-th place of the order has.
        start, end: `(4, S, R, M)` to be filled, or empty arrays.
        free: `(P, R)` to be filled: when each rank has done all.
    """
    num_stages = stage_rank.size
    num_lines = seconds.shape[2]
    arrive = np.zeros((2, num_stages, seconds.shape[3], num_lines))
    link = np.zeros((2, num_stages, num_lines))
    begins = np.zeros(num_lines)
    free[:] = 0.0
    keep = start.size > 0
    for a in range(stage.size):
        s, k, m = stage[a], kind[a], microbatch[a]
        at = position[m]
        rank = stage_rank[s]
        count = num_replicas[s]
        least = floor[k, s]
        way = 0 if k == 0 else 1
        before = s - 1 if k == 0 else s + 1  # the stage that the input comes from
        waits = before >= 0 if k == 0 else k != 3 and before < num_stages
        sends = k == 0 or (k != 3 and s > first_backward)
        bridged = (k == 0 and before == bridge) or (k != 0 and s == bridge)
        for r in range(count):
            begin = free[rank, r]
            if waits:
                if bridged:
                    low = forward_from[r, at, 0] if k == 0 else backward_from[r, at, 0]
                    high = forward_from[r, at, 1] if k == 0 else backward_from[r, at, 1]
                    for other in range(low, high):
                        if arrive[way, before, m, other] > begin:
                            begin = arrive[way, before, m, other]
                elif arrive[way, before, m, r] > begin:
                    begin = arrive[way, before, m, r]
            elif k == 0 and data_ready[r, m] > begin:
                begin = data_ready[r, m]
            begins[r] = begin
        if lockstep > 1:
            for group in range(0, count, lockstep):
                begin = begins[group]
                for r in range(group + 1, group + lockstep):
                    begin = max(begin, begins[r])
                begins[group : group + lockstep] = begin
        for r in range(count):
            took = seconds[k, s, r, at]
            if lockstep > 1:
                group = r - r % lockstep
                for other in range(group, group + lockstep):
                    took = max(took, seconds[k, s, other, at])
            if least > took:
                took = least
            done = begins[r] + took
            free[rank, r] = done
            if keep:
                start[k, s, r, at] = begins[r]
                end[k, s, r, at] = done
            if sends:
                length = transfer[way, s, r, at]
                if length > 0.0:
                    if link[way, s, r] > done:
                        done = link[way, s, r]
                    done += length
                    link[way, s, r] = done
                arrive[way, s, m, r] = done


@njit(cache=True, nogil=True)
def finish(free, num_rank_replicas, reduce, reduce_tail, last_backward, optimizer, ends):
    """Gradient reduction over the replicas of each rank, then the optimizer; fills `ends` (P, R); returns the last.

    A reduction starts when the slowest replica is through; the part of it that ran during the last backward is over,
    but never the last bucket (`reduce_tail`).
    """
    most = 0.0
    for p in range(free.shape[0]):
        slowest = 0.0
        hidden = np.inf
        for r in range(num_rank_replicas[p]):
            slowest = max(slowest, free[p, r])
            hidden = min(hidden, last_backward[p, r])
        shown = max(reduce[p] - hidden, reduce_tail[p]) if reduce[p] > 0.0 else 0.0
        for r in range(num_rank_replicas[p]):
            done = slowest + shown if reduce[p] > 0.0 else free[p, r]
            ends[p, r] = done + optimizer[p]
            most = max(most, ends[p, r])
    return most


@njit(cache=True, nogil=True)
def line_up(stage, kind, place, starts, num_stages, num_places, split, line):
    """Fills `line` with the places of all actions, each after what it waits for; returns how many could run.

    Args:
        stage, kind, place: `(num_actions,)`, rank after rank, each rank's actions in its order.
        starts: `(num_ranks + 1,)`, where each rank's begin.
        split: `(num_stages,)`, whether the stage's backward is split.
    """
    done = np.zeros((4, num_stages, num_places), dtype=np.bool_)
    at = starts[:-1].copy()
    count = 0
    moved = True
    while moved:
        moved = False
        for rank in range(starts.size - 1):
            while at[rank] < starts[rank + 1]:
                a = at[rank]
                s, k, m = stage[a], kind[a], place[a]
                if k == 0:
                    ready = s == 0 or done[0, s - 1, m]
                elif k == 3:
                    ready = done[2, s, m]
                else:
                    ready = done[0, s, m]
                    if s + 1 < num_stages:
                        ready = ready and done[2 if split[s + 1] else 1, s + 1, m]
                if not ready:
                    break
                done[k, s, m] = True
                line[count] = a
                count += 1
                at[rank] += 1
                moved = True
    return count


@njit(cache=True, nogil=True)
def greedy(
    stage_rank, num_ranks, seconds, transfer, data_ready, limit, first_backward, split, stage, kind, microbatch
):
    """List scheduling: whenever a rank is free it starts what is ready, a backward before a forward.

    Args:
        stage_rank: `(S,)`. seconds: `(4, S, M)`. transfer: `(2, S, M)`. data_ready: `(M,)`.
        limit: `(S,)`, most microbatches whose forward was begun and whose backward is not over.
        split: backwards in two parts, that of the weights when nothing else is ready.
        stage, kind, microbatch: `(num_actions,)` int64, to be filled, in time.

    Returns:
        Number of actions. With limits >= 1 it cannot get stuck: the last stage with a microbatch in flight can always
        run its backward.
    """
    num_stages = stage_rank.size
    num_microbatches = seconds.shape[2]
    forward = np.zeros(num_stages, dtype=np.int64)  # next of each stage
    backward = np.zeros(num_stages, dtype=np.int64)
    weight = np.zeros(num_stages, dtype=np.int64)
    arrive = np.full((2, num_stages, num_microbatches), np.inf)
    own = np.full((num_stages, num_microbatches), np.inf)
    free = np.zeros(num_ranks)
    best_time = np.full(num_ranks, np.inf)
    best_stage = np.zeros(num_ranks, dtype=np.int64)
    best_kind = np.zeros(num_ranks, dtype=np.int64)
    stale = np.ones(num_ranks, dtype=np.bool_)
    back = 2 if split else 1
    count = 0
    while True:
        for rank in range(num_ranks):
            if not stale[rank]:
                continue
            stale[rank] = False
            best_time[rank] = np.inf
            for urgency in range(3):  # backward, forward, weights
                for s in range(num_stages - 1, -1, -1):
                    if stage_rank[s] != rank:
                        continue
                    ready = np.inf
                    k = 0
                    if urgency == 0 and s >= first_backward and backward[s] < num_microbatches:
                        m = backward[s]
                        ready = own[s, m]
                        if s + 1 < num_stages:
                            ready = max(ready, arrive[1, s + 1, m])
                        k = back
                    elif urgency == 1 and forward[s] < num_microbatches:
                        m = forward[s]
                        finished = weight[s] if split else backward[s]
                        if s < first_backward or m - finished < limit[s]:
                            ready = data_ready[m] if s == 0 else arrive[0, s - 1, m]
                    elif urgency == 2 and split and weight[s] < backward[s]:
                        ready = 0.0
                        k = 3
                    time = max(ready, free[rank])
                    if time < best_time[rank]:
                        best_time[rank] = time
                        best_stage[rank] = s
                        best_kind[rank] = k
        rank = 0
        for other in range(1, num_ranks):
            if best_time[other] < best_time[rank]:
                rank = other
        time = best_time[rank]
        if time == np.inf:
            return count
        s = best_stage[rank]
        k = best_kind[rank]
        if k == 0:
            m = forward[s]
            forward[s] += 1
        elif k == 3:
            m = weight[s]
            weight[s] += 1
        else:
            m = backward[s]
            backward[s] += 1
        done = time + seconds[k, s, m]
        free[rank] = done
        stage[count], kind[count], microbatch[count] = s, k, m
        count += 1
        stale[rank] = True
        if k == 0:
            own[s, m] = done
            arrive[0, s, m] = done + transfer[0, s, m]
            if s + 1 < num_stages:
                stale[stage_rank[s + 1]] = True
        elif k != 3:
            arrive[1, s, m] = done + transfer[1, s, m]
            if s > 0:
                stale[stage_rank[s - 1]] = True


@njit(cache=True, nogil=True)
def _random(state):
    """A pseudo-random whole number in [0, 2**31); `state` (1,) uint64 is advanced (xorshift64)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64(x >> np.uint64(33))


@njit(cache=True, nogil=True)
def step_s(run_args, finish_args, position, start, end, free, ends):
    """Seconds of a step with the microbatches in the order `position`."""
    stage, kind, microbatch, _, _, _, seconds = run_args[:7]
    run(*run_args, position, start, end, free)
    num_rank_replicas, reduce, reduce_tail, last_action, optimizer = finish_args
    last_backward = np.zeros(free.shape)
    for p in range(free.shape[0]):
        a = last_action[p]
        if reduce[p] > 0.0 and a >= 0 and kind[a] != 0:
            for r in range(num_rank_replicas[p]):
                last_backward[p, r] = seconds[kind[a], stage[a], r, position[microbatch[a]]]
    return finish(free, num_rank_replicas, reduce, reduce_tail, last_backward, optimizer, ends)


@njit(cache=True, nogil=True)
def batch(run_args, finish_args, position, seconds, start, end, free, ends):
    """Seconds of many steps: `seconds` (N, 4, S, R, M) in place of those of `run_args`; -> (N,)."""
    found = np.empty(seconds.shape[0])
    for i in range(seconds.shape[0]):
        args = (*run_args[:6], seconds[i], *run_args[7:])
        found[i] = step_s(args, finish_args, position, start, end, free, ends)
    return found


@njit(cache=True, nogil=True)
def improve(run_args, finish_args, starts, evaluations, seed, start, end, free, ends):
    """Order of the microbatches in time: the best of `starts` (K, M), then swaps and moves that do not make it worse.

    Ends by work: `evaluations` steps timed. The first of equals wins, so that `starts[0]` is kept unless beaten.
    """
    best = starts[0].copy()
    best_value = step_s(run_args, finish_args, best, start, end, free, ends)
    for i in range(1, starts.shape[0]):
        value = step_s(run_args, finish_args, starts[i], start, end, free, ends)
        if value < best_value:
            best_value = value
            best = starts[i].copy()
    here = best.copy()
    here_value = best_value
    state = np.array([seed], dtype=np.uint64)
    size = best.size
    for _ in range(evaluations - starts.shape[0]):
        i = _random(state) % size
        j = _random(state) % size
        if i == j:
            continue
        tried = here.copy()
        if _random(state) % 2 == 0:
            tried[i], tried[j] = here[j], here[i]
        else:
            moved = here[i]
            if i < j:
                for at in range(i, j):
                    tried[at] = here[at + 1]
            else:
                for at in range(i, j, -1):
                    tried[at] = here[at - 1]
            tried[j] = moved
        value = step_s(run_args, finish_args, tried, start, end, free, ends)
        if value <= here_value:
            here, here_value = tried, value
            if value < best_value:
                best, best_value = tried.copy(), value
    return best, best_value
