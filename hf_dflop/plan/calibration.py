"""What a recorded run taught about a cost model: a factor and an offset for each kind of action.

In: predicted and measured seconds of actions. Out: a `Calibration` that corrects predictions, kept as JSON beside the
profile.

Source: least squares on relative errors, with factors and offsets >= 0.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.fit import nnls
from hf_dflop.errors import PlanError

__all__ = ["ACTION_KINDS", "Calibration", "fit_relative"]

CALIBRATION_SCHEMA_VERSION = 1

ACTION_KINDS: tuple[str, ...] = ("vision forward", "vision backward", "llm forward", "llm backward")

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Corrections: seconds = factor × predicted + offset.

    Raises:
        PlanError: an unknown kind, or a number that is negative or not finite.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    """Of `ACTION_KINDS`; 1 where one is missing."""
    offsets_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that every action of a kind that has work takes more; 0 where one is missing."""
    microbatch_s: float = 0.0
    """Seconds that every microbatch takes more, over all its actions."""
    reduce_s: float | None = None
    """Measured seconds of gradient reduction that nothing hides; None: as predicted."""
    optimizer_s: float | None = None
    data_s: float | None = None
    cost_version: str | None = None
    """`CostModel.version` of the predictions that are corrected."""

    def __post_init__(self) -> None:
        for name in ("factors", "offsets_s"):
            values = getattr(self, name)
            if unknown := set(values) - set(ACTION_KINDS):
                raise PlanError(f"{name} of the calibration names {sorted(unknown)}; use {', '.join(ACTION_KINDS)}.")
        numbers = [*self.factors.values(), *self.offsets_s.values(), self.microbatch_s]
        numbers += [value for value in (self.reduce_s, self.optimizer_s, self.data_s) if value is not None]
        if not all(np.isfinite(number) and number >= 0 for number in numbers):
            raise PlanError(f"the calibration holds {numbers}; all must be finite and >= 0. Calibrate again.")

    def apply(self, kind: str, seconds: FloatArray) -> FloatArray:
        """Corrected seconds of actions of a kind."""
        return self.factors.get(kind, 1.0) * seconds + self.offsets_s.get(kind, 0.0) * (seconds > 0)

    def to_dict(self) -> dict[str, Any]:
        """The calibration as plain JSON types, with the schema version."""
        return {"schema_version": CALIBRATION_SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Calibration":
        """Inverse of `to_dict`.

        Raises:
            PlanError: another schema version, or unknown fields.
        """
        fields = dict(data)
        if (version := fields.pop("schema_version", None)) != CALIBRATION_SCHEMA_VERSION:
            raise PlanError(
                f"the calibration has schema version {version!r}; hf_dflop here reads {CALIBRATION_SCHEMA_VERSION}. "
                "Calibrate again with `hf-dflop simulate --against RUN --save-calibration`."
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise PlanError(f"the calibration is not readable ({error}). Calibrate again.") from error

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON to `path`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote; raises what `from_dict` raises."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{path} is not a calibration ({error}).") from error
        if not isinstance(data, dict):
            raise PlanError(f"{path} is not a calibration: it is not a JSON object.")
        return cls.from_dict(data)


def fit_relative(columns: FloatArray, measured: FloatArray) -> FloatArray:
    """Coefficients >= 0 with the least squared relative error of `columns @ coefficients`, `(num_columns,)`.

    Args:
        columns: `(num_points, num_columns)`. measured: `(num_points,)`, > 0.
    """
    scaled = columns / measured[:, None]
    size = np.abs(scaled).max(axis=0)
    size[size == 0] = 1.0
    return nnls(scaled / size, np.ones(measured.size)) / size
