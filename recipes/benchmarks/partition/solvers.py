"""Every partitioner behind one signature: costs `(num_samples, 2)` and a number of buckets → a bucket per sample.

Those of others that take one number per sample get the sum of both components: there is no way to give them two.
Packages that are not installed raise `ImportError`, which the runner turns into a note.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SOLVERS", "Solver"]

Costs = npt.NDArray[np.float64]
Buckets = npt.NDArray[np.int64]
_RESOLUTION = 1_000_000
"""Whole numbers for packages that want them: the mean sample is about this ÷ number of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """A partitioner and what it is."""

    name: str
    package: str
    """Distribution that it comes from; the project's own name for ours and for the plain rules."""
    solve: Callable[[Costs, int, int], Buckets]
    """`solve(costs, num_buckets, seed)`."""
    components: int
    """Components of a cost that it balances: 2, or 1 for their sum."""
    max_samples: int = 1_000_000
    """Not run beyond: it would take minutes."""


def _ours(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    from hf_dflop.balance import partition

    return partition(costs, num_buckets, seed=seed).bucket


def _ours_one(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    from hf_dflop.balance import partition

    return partition(costs.sum(axis=1), num_buckets, seed=seed).bucket


def _random(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    """As many samples to each bucket, in random order: what a shuffled sampler does."""
    return np.random.default_rng(seed).permutation(np.arange(len(costs)) % num_buckets)


def _lpt_llm(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    """Longest processing time first on the LLM's component alone."""
    loads = np.zeros(num_buckets)
    bucket = np.empty(len(costs), dtype=np.int64)
    for sample in np.argsort(-costs[:, 1], kind="stable"):
        bucket[sample] = loads.argmin()
        loads[bucket[sample]] += costs[sample, 1]
    return bucket


def _cp_sat(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    """OR-Tools CP-SAT from nothing (no hint), 10 seconds, one worker: a boolean for each sample and bucket."""
    from ortools.sat.python import cp_model

    ticks = np.round(costs / costs.sum() * _RESOLUTION).astype(int)
    model = cp_model.CpModel()
    inside = [[model.new_bool_var("") for _ in range(num_buckets)] for _ in range(len(ticks))]
    load = model.new_int_var(0, 2 * _RESOLUTION, "load")
    for row in inside:
        model.add_exactly_one(row)
    for b in range(num_buckets):
        for c in range(ticks.shape[1]):
            model.add(sum(int(ticks[i, c]) * inside[i][b] for i in range(len(ticks))) <= load)
    model.minimize(load)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_time_in_seconds = 10.0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise RuntimeError("no solution within 10 s")
    return np.array([next(b for b in range(num_buckets) if solver.value(row[b])) for row in inside])


def _prtpy(algorithm: str) -> Callable[[Costs, int, int], Buckets]:
    def solve(costs: Costs, num_buckets: int, seed: int) -> Buckets:
        import prtpy

        numbers = {i: float(value) for i, value in enumerate(costs.sum(axis=1))}
        groups = prtpy.partition(algorithm=getattr(prtpy.partitioning, algorithm), numbins=num_buckets, items=numbers)
        return _bucket_of(groups, len(costs))

    return solve


def _binpacking(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    import binpacking

    numbers = {i: float(value) for i, value in enumerate(costs.sum(axis=1))}
    return _bucket_of(binpacking.to_constant_bin_number(numbers, num_buckets), len(costs))


def _seqpacker(costs: Costs, num_buckets: int, seed: int) -> Buckets:
    """It packs into bins of a capacity: the smallest capacity, to 0.1 %, that needs no more bins than there are."""
    from seqpacker import pack_sequences

    lengths = np.maximum(np.round(costs.sum(axis=1) / costs.sum() * _RESOLUTION), 1).astype(int).tolist()
    low = max(max(lengths), sum(lengths) // num_buckets)
    high = 2 * low
    while len(pack_sequences(lengths, capacity=high).bins) > num_buckets:
        low, high = high, 2 * high
    while high > 1.001 * low:
        middle = (low + high) // 2
        if len(pack_sequences(lengths, capacity=middle).bins) > num_buckets:
            low = middle
        else:
            high = middle
    return _bucket_of(pack_sequences(lengths, capacity=high).bins, len(costs))


def _bucket_of(groups: Any, num_samples: int) -> Buckets:
    bucket = np.full(num_samples, -1, dtype=np.int64)
    for number, group in enumerate(groups):
        bucket[list(group)] = number
    if (bucket < 0).any():
        raise RuntimeError(f"{int((bucket < 0).sum())} samples are in no bucket")
    return bucket


SOLVERS: list[Solver] = [
    Solver(name="hf_dflop, both costs", package="hf_dflop", solve=_ours, components=2),
    Solver(name="hf_dflop, their sum", package="hf_dflop", solve=_ours_one, components=1),
    Solver(name="random", package="hf_dflop", solve=_random, components=1),
    Solver(name="LPT on LLM cost", package="hf_dflop", solve=_lpt_llm, components=1),
    Solver(name="CP-SAT, 10 s", package="ortools", solve=_cp_sat, components=2, max_samples=512),
    Solver(name="prtpy LPT", package="prtpy", solve=_prtpy("lpt"), components=1),
    Solver(name="prtpy Karmarkar–Karp", package="prtpy", solve=_prtpy("kk"), components=1, max_samples=512),
    Solver(name="prtpy multifit", package="prtpy", solve=_prtpy("multifit"), components=1, max_samples=1024),
    Solver(name="binpacking", package="binpacking", solve=_binpacking, components=1),
    Solver(name="seqpacker", package="seqpacker", solve=_seqpacker, components=1),
]
"""In the order of the page."""
