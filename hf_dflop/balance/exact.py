"""Partition with OR-Tools CP-SAT: an offline check of `partition` on few samples, never part of a training step.

Inputs and output are those of `partition`. The solver runs single-threaded to a limit in deterministic time, from
the heuristic's partition as a hint, and returns that one if it finds nothing better.

Assumptions: worth it up to about 128 samples; beyond that the heuristic was measured to be better than the solver.
"""

from typing import Any

import numpy as np

from hf_dflop.balance.checks import checked_caps, checked_costs, checked_speeds
from hf_dflop.balance.partition import Partition, partition

__all__ = ["exact_partition"]

RESOLUTION = 1_000_000
"""Costs are rounded to this many steps of the heuristic's load."""


def exact_partition(
    costs: Any,
    num_buckets: int,
    *,
    weights: Any = None,
    caps: Any = None,
    seed: int = 0,
    max_work: float = 10.0,
) -> Partition:
    """The best partition that CP-SAT finds within `max_work`.

    Args:
        costs (`npt.ArrayLike`): `(num_samples, num_components)` seconds.
        num_buckets (`int`): number of buckets, each of which gets a sample.
        weights (`npt.ArrayLike`, *optional*): `(num_samples, k)` whole numbers under a cap.
        caps (`npt.ArrayLike`, *optional*): `(k,)`.
        seed (`int`, *optional*, defaults to 0): seed of the solver and of the heuristic.
        max_work (`float`, *optional*, defaults to 10.0): the solver's deterministic time, roughly seconds.

    Returns:
        `Partition`: `bound` is the better of the solver's and the trivial bound.

    Raises:
        ImportError: OR-Tools is not installed.
        BalanceError: as `partition`.

    Example:
        >>> exact_partition([3.0, 3.0, 2.0, 2.0, 2.0], 2).load  # doctest: +SKIP
        6.0
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ImportError(
            "exact_partition needs OR-Tools: pip install 'hf_dflop[exact]'. `partition` does without it."
        ) from error
    seconds = checked_costs(costs)
    checked_speeds(None, num_buckets)
    start = partition(seconds, num_buckets, weights=weights, caps=caps, seed=seed)
    if start.gap <= 0:
        return start
    whole_weights, whole_caps = checked_caps(weights, caps, len(seconds))
    unit = start.load / RESOLUTION
    ticks = np.floor(seconds / unit).astype(np.int64)  # rounded down: the solver's bound stays a bound
    model = cp_model.CpModel()
    samples, buckets = range(len(seconds)), range(num_buckets)
    inside = [[model.new_bool_var(f"in_{i}_{b}") for b in buckets] for i in samples]
    load = model.new_int_var(0, RESOLUTION, "load")
    for i in samples:
        model.add_exactly_one(inside[i])
        for b in range(i + 1, num_buckets):
            model.add(inside[i][b] == 0)  # buckets are alike: sample i opens at most bucket i
    for b in buckets:
        model.add_bool_or([inside[i][b] for i in samples])
        for c in range(seconds.shape[1]):
            model.add(sum(int(ticks[i, c]) * inside[i][b] for i in samples) <= load)
        for k in range(whole_caps.size):
            model.add(sum(int(whole_weights[i, k]) * inside[i][b] for i in samples) <= int(whole_caps[k]))
    names: dict[int, int] = {}
    for i in samples:  # number the heuristic's buckets by their first sample, as the symmetry rule wants
        names.setdefault(int(start.bucket[i]), len(names))
        for b in buckets:
            model.add_hint(inside[i][b], names[int(start.bucket[i])] == b)
    model.minimize(load)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = max_work
    status = solver.solve(model)
    bound = max(start.bound, min(start.load, solver.best_objective_bound * unit))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Partition(bucket=start.bucket, load=start.load, bound=bound)
    bucket = np.array([next(b for b in buckets if solver.value(inside[i][b])) for i in samples], dtype=np.int64)
    loads = np.zeros((num_buckets, seconds.shape[1]))
    np.add.at(loads, bucket, seconds)
    if float(loads.max()) >= start.load:
        return Partition(bucket=start.bucket, load=start.load, bound=bound)
    return Partition(bucket=bucket, load=float(loads.max()), bound=min(bound, float(loads.max())))
