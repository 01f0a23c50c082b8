"""Fits FLOP rates to measured microbatches: seconds ≈ overhead + Σ FLOPs of a term / rate of the term.

In: a matrix of FLOPs `(num_observations, 4)` and seconds. Out: the overhead, a rate per term, and the error
on observations that were held out. Non-negative least squares on relative errors (each row is divided by its
seconds).

A weak pull (`_PULL`) towards one rate for all terms keeps what the observations hardly determine within
reason.

Assumptions: one rate per term at all sizes. The LM head is proportional to the LLM's weights (both grow with
the row length) and the connector to the encoder's, so their rates can never be told apart: they share one.
Terms that the observations cannot tell apart are merged, and the merges are reported.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import ModelError

__all__ = ["RATE_TERMS", "FitError", "fit_rates", "nnls"]

RATE_TERMS = ("vision_linear", "vision_attention", "llm_linear", "llm_attention")
"""Terms with a rate of their own, in the order of the columns of the fit."""

_PARTNERS = {
    "vision_attention": "vision_linear",
    "llm_attention": "llm_linear",
    "vision_linear": "llm_linear",
}
_MIN_SINE = 0.02
"""A column is not told apart from the others when its angle to their span is below this sine."""
_SPREAD = 0.5
"""How far the inverse rates of two terms are expected to differ, relative to the mean inverse rate."""
_MIN_PULL = 1e-4

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitError:
    """Relative error of a fitted model, |predicted - measured| / measured, on held-out observations."""

    median: float
    p95: float
    num_fitted: int
    num_held_out: int
    merged: tuple[str, ...] = ()
    """Terms that share a rate because the observations could not tell them apart, as "a+b"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "merged", tuple(self.merged))


def nnls(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """Non-negative least squares: the x >= 0 that minimises |matrix · x - target|².

    Active-set method (Lawson and Hanson, Solving Least Squares Problems, chapter 23), for few columns.

    Args:
        matrix (`(num_rows, num_columns)` float64), target (`(num_rows,)` float64).

    Returns:
        `(num_columns,)` float64.
    """
    num_columns = matrix.shape[1]
    solution = np.zeros(num_columns)
    free = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-12 * max(float(np.abs(matrix.T @ target).max(initial=0.0)), 1e-300)
    for _ in range(10 * num_columns):
        gradient = matrix.T @ (target - matrix @ solution)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(num_columns)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            blocking = free & (trial <= 0)
            if not blocking.any():
                break
            steps = solution[blocking] / np.maximum(solution[blocking] - trial[blocking], 1e-300)
            solution = solution + float(steps.min()) * (trial - solution)
            free &= solution > 1e-15 * max(float(solution.max()), 1e-300)
            solution[~free] = 0.0
        solution = trial
    return solution


def _partner(group: tuple[str, ...], groups: list[tuple[str, ...]]) -> int | None:
    """Index in `groups` of the group that `group` falls back on, or None where there is none."""
    name = _PARTNERS.get(group[0])
    return next((i for i, other in enumerate(groups) if name in other), None)


def _solve(columns: FloatArray, seconds: FloatArray, groups: list[tuple[str, ...]]) -> tuple[float, FloatArray]:
    """Overhead in seconds and seconds per FLOP of each column, by relative error."""
    one_rate = float((seconds / columns.sum(axis=1)).mean())
    data = np.column_stack([np.ones_like(seconds), columns * one_rate]) / seconds[:, None]
    pulls = np.zeros((0, data.shape[1]))
    for index, group in enumerate(groups):
        partner = _partner(group, groups)
        if partner is not None:
            pull = np.zeros((1, data.shape[1]))
            pull[0, [1 + index, 1 + partner]] = 1.0, -1.0
            pulls = np.vstack([pulls, pull])
    target = np.concatenate([np.ones_like(seconds), np.zeros(len(pulls))])
    solution = np.zeros(data.shape[1])
    weight = _MIN_PULL
    for _ in range(3):
        matrix = np.vstack([data, weight * pulls])
        scale = np.linalg.norm(matrix, axis=0)
        solution = nnls(matrix / scale, target) / scale
        freedom = max(seconds.size - data.shape[1], 1)
        noise = float(np.sqrt(((data @ solution - 1) ** 2).sum() / freedom))
        weight = max(noise / _SPREAD, _MIN_PULL)
    return float(solution[0]), solution[1:] * one_rate


def _unidentifiable(columns: FloatArray, seconds: FloatArray, groups: list[tuple[str, ...]]) -> int | None:
    """Index of a group that cannot be told from the overhead and the others, or None."""
    weighted = np.column_stack([columns, np.ones_like(seconds)]) / seconds[:, None]
    norms = np.linalg.norm(weighted, axis=0)
    weak: list[tuple[bool, float, int]] = []
    for index, group in enumerate(groups):
        if norms[index] == 0:
            return index
        others = np.delete(weighted, index, axis=1) / np.delete(np.where(norms > 0, norms, 1.0), index)
        nearest = others @ np.linalg.lstsq(others, weighted[:, index], rcond=None)[0]
        sine = float(np.linalg.norm(weighted[:, index] - nearest) / norms[index])
        if sine < _MIN_SINE and len(groups) > 1:
            weak.append((not group[0].endswith("attention"), sine, index))
    return min(weak)[2] if weak else None


def _first_attention(groups: list[tuple[str, ...]]) -> int | None:
    return next((i for i, group in enumerate(groups) if group[0].endswith("attention")), None)


def fit_rates(flops: FloatArray, seconds: FloatArray) -> tuple[float, dict[str, float], tuple[str, ...]]:
    """Overhead and rates that explain the seconds of microbatches.

    Args:
        flops (`(num_observations, 4)` float64): FLOPs of each microbatch by term, columns as in `RATE_TERMS`.
        seconds (`(num_observations,)` float64): what each took.

    Returns:
        `tuple`: overhead in seconds, FLOP/s by term (positive and finite), and the merges that were needed:
        a term is merged into its module's other term, and the encoder into the LLM, while its column is empty
        or nearly dependent on the others, its rate comes out infinite, or there are fewer than two
        observations more than unknowns.

    Raises:
        ModelError: a microbatch without FLOPs, or the seconds do not grow with them.
    """
    if not (flops.sum(axis=1) > 0).all():
        raise ModelError("a measured microbatch has no FLOPs at all; drop it, or check its shape columns.")
    groups: list[tuple[str, ...]] = [(name,) for name in RATE_TERMS]
    merges: list[str] = []
    while True:
        columns = np.column_stack(
            [flops[:, [RATE_TERMS.index(name) for name in group]].sum(axis=1) for group in groups]
        )
        overhead, slopes = _solve(columns, seconds, groups)
        weak = _unidentifiable(columns, seconds, groups)
        if weak is None and len(groups) + 3 > seconds.size:
            weak = _first_attention(groups)
        if weak is None and (slopes <= 0).any():
            weak = int(np.flatnonzero(slopes <= 0)[0])
        if weak is None or len(groups) == 1:
            break
        if _partner(groups[weak], groups) is None:  # the LLM's weights: what falls back on them joins them
            weak = next(i for i, group in enumerate(groups) if _partner(group, groups) is not None)
        partner = _partner(groups[weak], groups)
        assert partner is not None
        merges.append("+".join((*groups[partner], *groups[weak])))
        groups[partner] = groups[partner] + groups[weak]
        del groups[weak]
    if (slopes <= 0).any():
        raise ModelError(
            f"the measured seconds ({seconds.min():.3g} to {seconds.max():.3g}) do not grow with the FLOPs "
            "of the microbatches. Measure microbatches of clearly different sizes, after warm-up."
        )
    rates = {name: 1.0 / float(slopes[i]) for i, group in enumerate(groups) for name in group}
    return overhead, rates, tuple(merges)
