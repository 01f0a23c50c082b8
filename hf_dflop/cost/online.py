"""Measured microbatches of a running training → a better cost model, a little at a time.

Input: a state, FLOPs by term and measured seconds of the microbatches of some steps, and the rank of each. Output: the
next state, and the cost model that it stands for. A pure function that gives the same bits on every platform: all
ranks call it with the same gathered numbers and go on with the same costs.

Method: seconds ≈ rank factor × (overhead + Σ FLOPs of a term ÷ rate), least squares on relative errors with Huber
weights (iteratively reweighted), in normal equations that forget. A weak pull holds the ratios of the base model
where the measurements do not tell terms apart, so that microbatches which are all alike change nothing.

Assumptions: those of `CostModel`: a term runs at one rate whatever its size. Measured are forward and backward of a
rank alone, without waiting for others.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.fit import RATE_TERMS
from hf_dflop.cost.model import CostModel, Rates
from hf_dflop.cost.slowness import RankSpeeds, watch
from hf_dflop.cost.small_solve import nonnegative_least_squares, sines
from hf_dflop.errors import ModelError

__all__ = ["OnlineFit", "Refinement", "refine"]

FloatArray = npt.NDArray[np.float64]

_SIZE = 1 + len(RATE_TERMS)
_MEMORY_STEPS = 64
_MIN_MICROBATCHES = 4
_HUBER = 1.345
_MIN_NOISE = 0.01
_SPREAD = 0.5
"""How far the rates of two terms may be expected to differ from the base model's ratio, relative."""
_FURTHEST = 32.0
"""A term's rate stays within this factor of the common scale."""
_MIN_SINE = 0.05
_MIN_CHANGE = 0.02
"""Predictions must move by this much (95th percentile, up to scale) to be worth another version."""
_PULLS = ((1, 3), (2, 1), (4, 3))
"""Pairs of terms that are pulled together: encoder and LLM, attention and the weights of its module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineFit:
    """What is remembered of all measurements so far; a few numbers, kept in checkpoints."""

    base: str
    """Version of the cost model whose rates the factors multiply."""
    factors: tuple[float, ...] = ()
    """(overhead in units of `unit_s`, then base rate ÷ rate of every term); empty before the first measurements."""
    unit_s: float = 1.0
    matrix: tuple[tuple[float, ...], ...] = ((0.0,) * _SIZE,) * _SIZE
    target: tuple[float, ...] = (0.0,) * _SIZE
    speeds: RankSpeeds

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", tuple(tuple(row) for row in self.matrix))
        for name in ("factors", "target"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def start(cls, model: CostModel, num_ranks: int) -> "OnlineFit":
        """Nothing measured yet."""
        return cls(base=model.version, speeds=RankSpeeds.even(num_ranks))

    def model(self, base: CostModel) -> CostModel:
        """The cost model that these factors stand for; `base` is the one that the fit started from."""
        if not self.factors:
            return base
        rates = {
            name: getattr(base.rates, name) / factor for name, factor in zip(RATE_TERMS, self.factors[1:], strict=True)
        }
        return replace(base, rates=Rates(**rates), per_microbatch_s=self.factors[0] * self.unit_s, fit_error=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "OnlineFit":
        """Inverse of `to_dict`.

        Raises:
            ModelError: a field is missing or unknown.
        """
        try:
            speeds = {name: tuple(value) for name, value in data["speeds"].items()}
            return cls(**{**data, "speeds": RankSpeeds(**speeds)})
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the state of the cost correction is not readable ({error}). Start without it: it begins anew."
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """What one more set of measurements brought."""

    model: CostModel
    """The refined cost model."""
    error_before: float
    """Mean |measured − predicted| ÷ predicted of the model in force, with the best common factor."""
    error: float
    """The same of the refined model, with the ranks' factors."""
    changed: bool
    """Predictions moved enough, and towards what was measured."""
    num_used: int
    num_unusable: int
    """Microbatches without a positive, finite time."""
    undetermined: tuple[str, ...]
    """Terms that the microbatches do not tell apart from others; the base model's ratio holds for them."""


def refine(
    fit: OnlineFit,
    base: CostModel,
    current: CostModel,
    flops: FloatArray,
    seconds: FloatArray,
    rank: npt.NDArray[np.int64],
    *,
    steps: int,
) -> tuple[OnlineFit, Refinement]:
    """Learn from the microbatches of `steps` more optimizer steps.

    Args:
        fit (`OnlineFit`): what is remembered so far.
        base (`CostModel`), current (`CostModel`): what the fit started from, and what is in force.
        flops (`(num_microbatches, 4)` float64): FLOPs by term, columns as in `RATE_TERMS`.
        seconds (`(num_microbatches,)` float64): measured; what is not positive and finite is left out.
        rank (`(num_microbatches,)` int64): where each ran.

    Returns:
        `tuple[OnlineFit, Refinement]`: the same state when fewer than 4 microbatches can be used.
    """
    usable = np.isfinite(seconds) & (seconds > 0) & (flops.sum(axis=1) > 0)
    num_unusable = int(usable.size - np.count_nonzero(usable))
    nothing = Refinement(
        model=current, error_before=float("nan"), error=float("nan"), changed=False, num_used=0,
        num_unusable=num_unusable, undetermined=RATE_TERMS,
    )  # fmt: skip
    if np.count_nonzero(usable) < _MIN_MICROBATCHES:
        return fit, nothing
    flops, seconds, rank = flops[usable], seconds[usable], rank[usable]
    terms = _seconds_by_term(base, flops)
    plain = _combine([1.0] * len(RATE_TERMS), terms)
    unit_s = fit.unit_s if fit.factors else float(np.median(plain))
    columns = [np.full_like(seconds, unit_s), *terms]
    speeds = fit.speeds
    factors = list(fit.factors) or [0.0, *([float(np.median(seconds / plain))] * len(RATE_TERMS))]
    old_matrix, old_target = _forgotten(fit, steps)
    matrix, target = old_matrix, old_target
    for _ in range(30):
        predicted = _combine(factors, columns)
        speeds = watch(fit.speeds, rank, seconds / predicted, steps)
        expected = predicted * np.asarray(speeds.slowness)[rank]
        ratio = seconds / expected
        noise = max(1.4826 * float(np.median(np.abs(ratio - 1.0))), _MIN_NOISE)
        weight = np.minimum(1.0, _HUBER * noise / np.maximum(np.abs(ratio - 1.0), 1e-12))
        scaled = [column / predicted for column in columns]
        matrix = [
            [old_matrix[i][j] + _sum(weight * scaled[i] * scaled[j]) for j in range(_SIZE)] for i in range(_SIZE)
        ]
        target = [old_target[i] + _sum(weight * scaled[i] * ratio) for i in range(_SIZE)]
        common = float(np.median(seconds / (plain * np.asarray(speeds.slowness)[rank])))
        found = nonnegative_least_squares(_pulled(matrix, noise, common, unit_s, predicted), target)
        found = [found[0], *(min(max(value, common / _FURTHEST), common * _FURTHEST) for value in found[1:])]
        moved = max(abs(new - old) for new, old in zip(found, factors, strict=True))
        factors = found
        if moved <= 1e-6 * common:
            break
    refined = replace(
        fit,
        factors=tuple(factors),
        unit_s=unit_s,
        matrix=tuple(tuple(row) for row in matrix),
        target=tuple(target),
        speeds=speeds,
    )
    model = refined.model(base)
    predicted = _combine(factors, columns)
    now = _combine([1.0] * len(RATE_TERMS), _seconds_by_term(current, flops)) + current.per_microbatch_s
    own = seconds / np.asarray(speeds.slowness)[rank]
    before_scale = float(np.median(own / now))
    error_before = _mean(np.abs(own / (now * before_scale) - 1.0))
    error = _mean(np.abs(own / predicted - 1.0))
    drift = np.sort(np.abs(now * before_scale / predicted - 1.0))
    moved_by = float(drift[int(0.95 * (drift.size - 1))])
    off_scale = not 0.8 < before_scale < 1.25
    return refined, Refinement(
        model=model,
        error_before=error_before,
        error=error,
        changed=off_scale or (moved_by > _MIN_CHANGE and error <= error_before),
        num_used=int(seconds.size),
        num_unusable=num_unusable,
        undetermined=tuple(name for name, sine in zip(RATE_TERMS, sines(matrix)[1:], strict=True) if sine < _MIN_SINE),
    )


def _seconds_by_term(model: CostModel, flops: FloatArray) -> list[FloatArray]:
    return [flops[:, j] / getattr(model.rates, name) for j, name in enumerate(RATE_TERMS)]


def _forgotten(fit: OnlineFit, steps: int) -> tuple[list[list[float]], list[float]]:
    keep = 1.0
    for _ in range(steps):
        keep *= 1.0 - 1.0 / _MEMORY_STEPS
    return [[keep * value for value in row] for row in fit.matrix], [keep * value for value in fit.target]


def _pulled(
    matrix: list[list[float]], noise: float, common: float, unit_s: float, predicted: FloatArray
) -> list[list[float]]:
    """The normal equations with the weak pulls: of terms towards each other, of the overhead towards 0."""
    pulled = [list(row) for row in matrix]
    strength = noise / (_SPREAD * common)
    strength *= strength
    for i, j in _PULLS:
        pulled[i][i] += strength
        pulled[j][j] += strength
        pulled[i][j] -= strength
        pulled[j][i] -= strength
    share = noise / _SPREAD * (unit_s / float(np.median(predicted)))
    pulled[0][0] += share * share
    return pulled


def _combine(factors: list[float], columns: list[FloatArray]) -> FloatArray:
    """Σ factor × column, added in order: a matrix product would round differently on different processors."""
    total = factors[0] * columns[0]
    for factor, column in zip(factors[1:], columns[1:], strict=True):
        total = total + factor * column
    return total


def _sum(values: FloatArray) -> float:
    return float(np.add.accumulate(values)[-1])


def _mean(values: FloatArray) -> float:
    return _sum(values) / values.size
