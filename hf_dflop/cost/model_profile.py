"""What was measured of a model on a device: the points, and what follows from them.

`hf-dflop measure` writes it as JSON; planner and cost model read it without torch. Kept are the measured points, not
the curves: curves are fitted when asked for, the same on every machine.

Assumptions: layers of one kind are alike, so two depths tell what a layer takes; kinds (windowed and global, dense
and experts) are measured apart and weighted by how many layers of each the model has. A tensor-parallel shard runs
without its communication. Rows have no padding mask.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.activations import PartMemory
from hf_dflop.cost.curves import Curve
from hf_dflop.cost.fit import FitError
from hf_dflop.cost.measurement import GROUP_OF_PART, Direction, Measurement, group_curves, group_memory
from hf_dflop.cost.parts import PartState, check_part
from hf_dflop.cost.spec import ModelSpec
from hf_dflop.errors import ModelError

__all__ = ["PROFILE_SCHEMA_VERSION", "ModelProfile"]

PROFILE_SCHEMA_VERSION = 1

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """Measured seconds and bytes of a model's parts.

    [`measure_model`] makes it, `CostModel.from_profile` turns it into costs, `stage_memory` and the planner read it.
    """

    spec: ModelSpec
    model: str = ""
    """What was measured, as it was named."""
    device: str = "cpu"
    """The device in words."""
    dtype: str = "float32"
    attention: str = "sdpa"
    versions: Mapping[str, str] = field(default_factory=dict)
    num_threads: int = 1
    """Of the CPU, where that computed."""
    layer_kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """For `vision` and `llm`, how many layers of each kind the model has."""
    connector_in_encoder: bool = False
    """The connector is a child of the encoder (Qwen-VL): its share is taken off the encoder's fixed part."""
    num_parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Parameters of each part (of one mean layer), by tensor-parallel degree ("1", "2", ...)."""
    notes: tuple[str, ...] = ()
    """What was assumed or could not be measured, in sentences."""
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurements", tuple(self.measurements))
        object.__setattr__(self, "notes", tuple(self.notes))
        kinds = {group: tuple(int(count) for count in counts) for group, counts in self.layer_kinds.items()}
        object.__setattr__(self, "layer_kinds", kinds)

    def __hash__(self) -> int:
        return hash((self.spec, self.device, self.dtype, self.measurements))

    def points(
        self, group: str, *, kind: int = 0, tp: int = 1, state: PartState = "trained", checkpointing: bool = False
    ) -> tuple[Measurement, ...]:
        """The fitted points of one setting; empty where it was not measured.

        A setting without layers to recompute (connector, head) is the same with and without checkpointing.
        """
        if group not in ("vision", "llm"):
            checkpointing = False
        setting = (group, kind, tp, state, checkpointing)
        return tuple(point for point in self.measurements if point.setting == setting and not point.held_out)

    def _kinds(self, group: str) -> tuple[int, ...]:
        return self.layer_kinds.get(group, (1,))

    def _inside(self) -> tuple[Measurement, ...]:
        """Points of the connector, in whatever state it was measured together with the encoder."""
        states = [point.state for point in self.measurements if point.group == "connector"]
        return self.points("connector", state=states[0]) if states else ()

    def part_curves(
        self, part: str, direction: Direction, *, state: PartState, checkpointing: bool = False, tp: int = 1
    ) -> tuple[tuple[float, Curve], ...] | None:
        """Curves whose weighted sum is the seconds of a part; None where the setting was not measured.

        A mean layer is a sum over the kinds of layers; the fixed part of an encoder that holds the connector is its
        own curve minus the connector's.

        Raises:
            ModelError: not a part.
        """
        group = GROUP_OF_PART[check_part(part)]
        kinds = self._kinds(group)
        fitted = []
        for kind in range(len(kinds)):
            points = self.points(group, kind=kind, tp=tp, state=state, checkpointing=checkpointing)
            if not points:
                return None
            fitted.append(group_curves(points, direction))
        if part.endswith("_layer"):
            return tuple((count / sum(kinds), layer) for count, (layer, _) in zip(kinds, fitted, strict=True))
        fixed: tuple[tuple[float, Curve], ...] = ((1.0, fitted[0][1]),)
        if part == "vision_fixed" and self.connector_in_encoder:
            inside = self._inside()
            if inside:
                fixed += ((-1.0 / self.spec.connector.copies, group_curves(inside, direction)[1]),)
        return fixed

    def part_seconds(
        self,
        part: str,
        direction: Direction,
        tokens: npt.ArrayLike,
        pairs: npt.ArrayLike,
        *,
        state: PartState,
        checkpointing: bool = False,
        tp: int = 1,
    ) -> FloatArray | None:
        """Seconds of a part (of one layer) for microbatches, `(num,)`; None where it was not measured."""
        curves = self.part_curves(part, direction, state=state, checkpointing=checkpointing, tp=tp)
        if curves is None:
            return None
        total = np.sum([weight * curve.at(tokens, pairs) for weight, curve in curves], axis=0)
        return np.maximum(total, 0.0)

    def part_memory(
        self, part: str, *, state: PartState, checkpointing: bool, tp: int, dtype: str
    ) -> PartMemory | None:
        """Measured activation bytes of a part; None where this setting or dtype was not measured."""
        group = GROUP_OF_PART[check_part(part)]
        if dtype != self.dtype:
            return None
        kinds = self._kinds(group)
        fitted = []
        for kind in range(len(kinds)):
            points = self.points(group, kind=kind, tp=tp, state=state, checkpointing=checkpointing)
            if not points:
                return None
            fitted.append(group_memory(points))
        if not part.endswith("_layer"):
            fixed = fitted[0][1]
            if part == "vision_fixed" and self.connector_in_encoder:
                inside = self._inside()
                kept = group_memory(inside)[1].kept_per_token_bytes / self.spec.connector.copies if inside else 0.0
                return replace(fixed, kept_per_token_bytes=max(fixed.kept_per_token_bytes - kept, 0.0))
            return fixed
        shares = [count / sum(kinds) for count in kinds]
        layers = [layer for layer, _ in fitted]
        return PartMemory(
            kept_per_token_bytes=sum(s * one.kept_per_token_bytes for s, one in zip(shares, layers, strict=True)),
            kept_per_pair_bytes=sum(s * one.kept_per_pair_bytes for s, one in zip(shares, layers, strict=True)),
            extra_per_token_bytes=max(one.extra_per_token_bytes for one in layers),
            extra_per_pair_bytes=max(one.extra_per_pair_bytes for one in layers),
        )

    def parameters(self, part: str, *, tp: int) -> int | None:
        """Counted parameters of a part (of one mean layer) as one shard holds it; None where not counted."""
        return self.num_parameters.get(check_part(part), {}).get(str(tp))

    def relative_errors(self, direction: Direction | None = None, *, group: str | None = None) -> FloatArray:
        """|predicted − measured| ÷ measured of every held-out point, `(num_held_out,)`.

        Args:
            direction (`str`, *optional*): forward or backward alone; their sum if not given.
            group (`str`, *optional*): of this group alone.
        """
        directions: tuple[Direction, ...] = (direction,) if direction else ("forward", "backward")
        errors = []
        for held in self.measurements:
            if not held.held_out or (group is not None and held.group != group):
                continue
            measured = sum(held.seconds(one) for one in directions)
            if measured > 0:
                predicted = sum(self._predict(held, one) for one in directions)
                errors.append(abs(predicted - measured) / measured)
        return np.asarray(errors)

    def _predict(self, held: Measurement, direction: Direction) -> float:
        points = self.points(
            held.group, kind=held.kind, tp=held.tp, state=held.state, checkpointing=held.checkpointing
        )
        layer, fixed = group_curves(points, direction)
        layers = held.depth * layer.at(held.tokens, held.pairs)[0] if held.depth else 0.0
        return float(layers + fixed.at(held.tokens, held.pairs)[0])

    @property
    def error(self) -> FitError | None:
        """Held-out error of forward and backward together; None if nothing was held out."""
        errors = self.relative_errors()
        if not errors.size:
            return None
        return FitError(
            median=float(np.median(errors)),
            p95=float(np.percentile(errors, 95)),
            num_fitted=sum(not point.held_out for point in self.measurements),
            num_held_out=int(errors.size),
        )

    def merge(self, *others: "ModelProfile") -> "ModelProfile":
        """This profile with the points of others: other tensor-parallel degrees, frozen modules, checkpointing.

        Raises:
            ModelError: they are of another model, device, dtype or attention.
        """
        return reduce(_merged, others, self)

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON types, with the schema version."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in ("spec", "measurements")}
        return {
            "schema_version": PROFILE_SCHEMA_VERSION,
            **fields,
            "layer_kinds": {group: list(counts) for group, counts in self.layer_kinds.items()},
            "notes": list(self.notes),
            "spec": self.spec.to_dict(),
            "measurements": [asdict(point) for point in self.measurements],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelProfile":
        """Inverse of `to_dict`.

        Raises:
            ModelError: the schema version is another one, or a field is missing or unknown.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != PROFILE_SCHEMA_VERSION:
            raise ModelError(
                f"the model profile has schema version {version!r}; hf_dflop here reads {PROFILE_SCHEMA_VERSION}. "
                "Measure again with hf-dflop measure."
            )
        try:
            fields["spec"] = ModelSpec.from_dict(fields["spec"])
            fields["measurements"] = tuple(Measurement(**point) for point in fields["measurements"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the model profile is not readable ({error}). Measure again with hf-dflop measure."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON to `path`, whole or not at all."""
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> "ModelProfile":
        """Read a profile that `save` wrote.

        Raises:
            ModelError: not JSON, or what `from_dict` raises.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not a model profile ({error}); hf-dflop measure writes one.") from error
        if not isinstance(data, dict):
            raise ModelError(f"{path} is not a model profile; hf-dflop measure writes one.")
        return cls.from_dict(data)


def _merged(one: ModelProfile, other: ModelProfile) -> ModelProfile:
    for name in ("spec", "device", "dtype", "attention", "num_threads", "connector_in_encoder", "layer_kinds"):
        if getattr(one, name) != getattr(other, name):
            raise ModelError(
                f"the profiles differ in {name}: {getattr(one, name)!r} and {getattr(other, name)!r}. "
                "Only measurements of one model on one device, in one format, can be merged."
            )
    counted = {
        part: {**one.num_parameters.get(part, {}), **other.num_parameters.get(part, {})}
        for part in {*one.num_parameters, *other.num_parameters}
    }
    return replace(
        one,
        num_parameters=dict(sorted(counted.items())),
        notes=tuple(dict.fromkeys((*one.notes, *other.notes))),
        measurements=tuple(dict.fromkeys((*one.measurements, *other.measurements))),
    )
