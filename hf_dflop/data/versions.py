"""Which cost model holds for which optimizer step: versions, each declared ahead for a step and all after it.

Input: shapes, a first cost model, and later ones with the step from which they hold. Output: the seconds of any
samples under the version of a step.

An assignment stays a pure function of its step: a version can only be declared for steps that no rank has planned
yet. Steps are counted from the start of the training: epoch × steps per epoch + step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import CostModel
from hf_dflop.cost.fit import RATE_TERMS
from hf_dflop.data.dummies import Dummy
from hf_dflop.data.joined_rows import RowCost
from hf_dflop.errors import BalanceError, ModelError
from hf_dflop.shapes import Shapes

__all__ = ["CostVersion", "CostVersions"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CostVersion:
    """A cost model, and how fast each rank is, from a step on."""

    number: int
    """0 for the model that training began with."""
    from_step: int
    model: CostModel
    rank_speeds: tuple[float, ...] | None = None
    """Relative speeds of the ranks; None: all alike."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "number": self.number,
            "from_step": self.from_step,
            "model": self.model.to_dict(),
            "rank_speeds": None if self.rank_speeds is None else list(self.rank_speeds),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CostVersion":
        """Inverse of `to_dict`.

        Raises:
            ModelError: a field is missing, or the cost model is not readable.
        """
        try:
            speeds = data["rank_speeds"]
            return cls(
                number=int(data["number"]),
                from_step=int(data["from_step"]),
                model=CostModel.from_dict(data["model"]),
                rank_speeds=None if speeds is None else tuple(float(speed) for speed in speeds),
            )
        except (KeyError, TypeError) as error:
            raise ModelError(f"a cost version is not readable ({error}).") from error


class CostVersions:
    """The versions of a run, and what every sample computes, which they turn into seconds.

    Args:
        shapes ([`Shapes`]): the whole dataset.
        model ([`CostModel`]): version 0. Later ones differ from it in rates and overhead.
        padded (`bool`): whether microbatches are padded to their longest sample.
        all_pairs (`bool`): a packed row costs what one sample of its length would, see `joined_rows`.
    """

    def __init__(self, shapes: Shapes, model: CostModel, *, padded: bool, all_pairs: bool = False) -> None:
        self._base = model
        self._padded = padded
        self._joined = all_pairs and not padded
        self._tokens = shapes.llm_tokens
        self._flops = np.column_stack([model.vision_work(shapes), model.llm_work(self._tokens)])
        self._versions = [CostVersion(number=0, from_step=0, model=model)]
        self.planned_through = -1
        """The last step that was planned, or is being planned; on every rank maybe another one."""

    @property
    def newest(self) -> CostVersion:
        """The version that was declared last; it may not be in force yet."""
        return self._versions[-1]

    def at(self, step: int) -> CostVersion:
        """The version that holds for a step."""
        holding = [version for version in self._versions if version.from_step <= step]
        return holding[-1] if holding else self._versions[0]

    def declare(self, version: CostVersion) -> None:
        """Let a version hold from `version.from_step` on.

        Raises:
            BalanceError: that step was planned already: ranks would load samples twice, or not at all.
        """
        if version.from_step <= self.planned_through:
            raise BalanceError(
                f"cost version {version.number} was declared from step {version.from_step}, but steps up to "
                f"{self.planned_through} are planned already; declare it for a later step"
            )
        self._versions.append(version)

    def restore(self, versions: Sequence[CostVersion]) -> None:
        """Take over the versions of a checkpoint, in force and yet to come."""
        self._versions = sorted(versions, key=lambda version: version.number)

    def in_force(self, step: int) -> list[CostVersion]:
        """What a checkpoint after the steps before `step` has to keep."""
        now = self.at(step)
        return [now, *(version for version in self._versions if version.number > now.number)]

    def seconds(self, indices: npt.NDArray[np.int64], version: CostVersion) -> tuple[FloatArray, FloatArray]:
        """Vision and LLM seconds of samples alone, `(num_samples,)` each."""
        rates = version.model.rates
        vision_linear, vision_attention, llm_linear, llm_attention = self._flops[indices].T
        return (
            vision_linear / rates.vision_linear + vision_attention / rates.vision_attention,
            llm_linear / rates.llm_linear + llm_attention / rates.llm_attention,
        )

    def first_seconds(self) -> FloatArray:
        """Seconds of every sample alone under the model that training began with, `(num_samples,)`."""
        every = np.arange(len(self._tokens))
        return np.sum(self.seconds(every, CostVersion(number=0, from_step=0, model=self._base)), axis=0)

    def row_cost(self, version: CostVersion) -> RowCost | None:
        """What a joined row costs under a version; None where a row costs the sum of its samples."""
        return _VersionRows(self._base, version) if self._joined else None

    def dummy(self, dummy: Dummy, version: CostVersion) -> Dummy:
        """A dummy priced by the first model, under a version."""
        first, now = self._base.rates, version.model.rates
        return replace(
            dummy,
            vision_s=dummy.vision_s * first.vision_linear / now.vision_linear,
            llm_s=dummy.llm_s * first.llm_linear / now.llm_linear,
        )

    def microbatch_flops(self, microbatches: Sequence[Sequence[int]]) -> FloatArray:
        """FLOPs by term that microbatches of these samples compute, padding included, `(num_microbatches, 4)`."""
        flops = np.zeros((len(microbatches), len(RATE_TERMS)))
        for row, microbatch in enumerate(microbatches):
            own = self._flops[np.asarray(microbatch, dtype=np.int64)]
            if not len(own):
                continue
            flops[row] = np.add.accumulate(own, axis=0)[-1]
            if self._padded:
                flops[row, 2:] = len(own) * own[self._tokens[list(microbatch)].argmax(), 2:]
        if self._joined:
            flops[:, 2:] = self._base.llm_work([int(self._tokens[list(group)].sum()) for group in microbatches])
        return flops

    def module_seconds(self, microbatches: Sequence[Sequence[int]], version: CostVersion) -> FloatArray:
        """Predicted seconds of microbatches by module, `(num_microbatches, 2)`: vision, LLM; without the overhead."""
        rates = version.model.rates
        seconds = self.microbatch_flops(microbatches) / [getattr(rates, name) for name in RATE_TERMS]
        return np.column_stack([seconds[:, 0] + seconds[:, 1], seconds[:, 2] + seconds[:, 3]])


class _VersionRows:
    """The LLM's seconds of rows under a version."""

    def __init__(self, base: CostModel, version: CostVersion) -> None:
        self._base = base
        self._rates = version.model.rates

    def llm_s(self, tokens: Any) -> FloatArray:
        linear, attention = self._base.llm_work(tokens).T
        return linear / self._rates.llm_linear + attention / self._rates.llm_attention
