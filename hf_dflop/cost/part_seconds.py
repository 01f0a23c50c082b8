"""Forward and backward seconds of each part of a model: measured where there is a measurement, a roofline elsewhere.

In: a `ModelSpec`, optionally a `ModelProfile`, what is trained; sizes of microbatches. Out: `PartSeconds`. Three
sources, told with the answer:

    measured   the profile has this part at this degree, state and recomputation
    scaled     the profile has the part in another setting: its seconds × the ratio of the two rooflines
    roofline   nothing was measured: the larger of FLOPs ÷ rate and bytes ÷ bandwidth

Assumptions: a roofline knows no launch overhead; attention kernels of a GPU skip what the causal mask hides. What
tensor-parallel ranks tell each other is not in here.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.activations import dtype_bytes
from hf_dflop.cost.flops import Trainable
from hf_dflop.cost.measurement import GROUP_OF_PART, Direction, Measurement
from hf_dflop.cost.model_profile import ModelProfile
from hf_dflop.cost.parameters import parameter_counts
from hf_dflop.cost.parts import PartState, check_part, part_states
from hf_dflop.cost.spec import ModelSpec, TransformerSpec
from hf_dflop.errors import ModelError

__all__ = ["PartCosts", "PartSeconds", "Source", "part_flops"]

FloatArray = npt.NDArray[np.float64]
Source = Literal["measured", "scaled", "roofline"]

_ERROR_OF_ROOFLINE = 0.5
"""Relative error told for seconds that nothing was measured for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSeconds:
    """Seconds of one part (of one layer, for the layers) for microbatches; arrays of shape `(num_microbatches,)`."""

    forward_s: FloatArray
    backward_s: FloatArray
    """Recomputation included."""
    source: Source
    relative_error: float
    """95th percentile of the held-out error of what this was taken from; 0.5 for a roofline."""
    is_beyond: npt.NDArray[np.bool_]
    """Larger than anything that was measured."""

    @property
    def total_s(self) -> FloatArray:
        return self.forward_s + self.backward_s


def part_flops(
    spec: ModelSpec, part: str, tokens: npt.ArrayLike, pairs: npt.ArrayLike, *, tp: int = 1, causal_factor: float = 0.5
) -> tuple[FloatArray, FloatArray]:
    """Forward FLOPs of a part (of one mean layer) on one tensor-parallel rank: of its weights, and of attention.

    Args:
        spec (`ModelSpec`), part (`str`): of which model, one of `PARTS`.
        tokens, pairs (`(num,)`): positions of each microbatch, and the sum over its sequences of length².
        tp (`int`): degree; the connector and what is fixed in the encoder are not split.
        causal_factor (`float`): see `llm_terms`.

    Returns:
        two float64 arrays `(num,)`.
    """
    count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
    squares = np.atleast_1d(np.asarray(pairs, dtype=np.float64))
    nothing = np.zeros_like(count)
    check_part(part)
    if part == "vision_fixed":
        values = spec.channels * spec.temporal_patch_size * spec.patch_size**2
        return 2.0 * values * spec.vision.hidden * count, nothing
    if part == "connector":
        sizes = sum(fan_in * fan_out for fan_in, fan_out in spec.connector.linears)
        return 2.0 * spec.connector.copies * sizes / spec.connector.merge * count, nothing
    if part == "llm_fixed":
        return nothing, nothing
    if part == "llm_head":
        return 2.0 * spec.llm.hidden * spec.llm.vocab / tp * count, nothing
    layer = spec.vision if part == "vision_layer" else spec.llm
    factor = 1.0 if part == "vision_layer" else causal_factor
    return _weights_per_token(layer) / tp * count, _pair_flops(layer, factor, count, squares) / tp


def _weights_per_token(layer: TransformerSpec) -> float:
    attention = 2.0 * layer.hidden * (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    matrices = 3 if layer.gated_mlp else 2
    share = layer.num_moe_layers / layer.num_layers
    width = (1 - share) * layer.intermediate
    width += share * (layer.active_experts * layer.expert_intermediate + layer.shared_intermediate)
    return attention + 2.0 * layer.hidden * (matrices * width + share * layer.num_experts)


def _pair_flops(layer: TransformerSpec, factor: float, tokens: FloatArray, pairs: FloatArray) -> FloatArray:
    """Windowed layers compute at most a window of pairs for each token."""
    windowed = np.minimum(factor * pairs, float(layer.window_tokens) * tokens)
    share = layer.num_windowed_layers / layer.num_layers
    return 4.0 * layer.heads * layer.head_dim * ((1 - share) * factor * pairs + share * windowed)


def _backward_factors(state: PartState, *, recomputes: bool, shared_weights: bool = True) -> tuple[float, float]:
    """Backward FLOPs of weights and of attention, as multiples of the forward's."""
    if state == "frozen":
        return 0.0, 0.0
    again = float(recomputes and shared_weights)
    return (2.0 if state == "trained" else 1.0) + again, 2.0 + again


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCosts:
    """Seconds of the parts of a model, for a planner.

    Example:
        >>> from hf_dflop.cost import ConnectorSpec, ModelSpec, TransformerSpec
        >>> size = dict(hidden=4, num_layers=1, heads=2, kv_heads=2, head_dim=2, intermediate=8, gated_mlp=False)
        >>> spec = ModelSpec(vision=TransformerSpec(**size), connector=ConnectorSpec(merge=1, linears=((4, 4),)),
        ...                  llm=TransformerSpec(**size, vocab=20), patch_size=2)
        >>> costs = PartCosts(spec=spec, flops_per_s=1e6, bytes_per_s=1e9, dtype="float32")
        >>> head = costs.seconds("llm_head", [10], [100])  # 2 · 4 · 20 FLOPs a token
        >>> head.source, round(float(head.forward_s[0]), 9), round(float(head.backward_s[0]), 9)
        ('roofline', 0.0016, 0.0032)
    """

    spec: ModelSpec
    profile: ModelProfile | None = None
    trainable: Trainable = field(default_factory=Trainable)
    flops_per_s: float = 1e12
    """What matrix products reach, for a roofline (a GPU reaches 40 to 60 per cent of its data sheet)."""
    bytes_per_s: float = 1e11
    """Memory bandwidth, for a roofline."""
    dtype: str = "bfloat16"
    causal_factor: float = 0.5

    def __post_init__(self) -> None:
        dtype_bytes(self.dtype)
        if not (self.flops_per_s > 0 and self.bytes_per_s > 0):
            raise ModelError(f"flops_per_s={self.flops_per_s}, bytes_per_s={self.bytes_per_s}; both must be positive.")
        if self.profile is not None and self.profile.spec != self.spec:
            raise ModelError(
                "the model profile is of a model of another structure than the spec. Measure the model that is "
                "planned for: hf-dflop measure --model ..."
            )

    def seconds(
        self, part: str, tokens: npt.ArrayLike, pairs: npt.ArrayLike, *, tp: int = 1, checkpointing: bool = False
    ) -> PartSeconds:
        """Seconds of a part for microbatches.

        Args:
            part (`str`): one of `PARTS`; of a layer, the seconds of one mean layer.
            tokens (`(num,)`): positions (of the encoder, also for the connector; of the LLM).
            pairs (`(num,)`): sum over the sequences of length².
            tp (`int`, defaults to 1): tensor-parallel degree, without communication.
            checkpointing (`bool`, defaults to `False`): layers are recomputed in the backward.

        Returns:
            `PartSeconds`

        Raises:
            ModelError: not a part, or a degree below 1.
        """
        if tp < 1:
            raise ModelError(f"tp={tp}; a tensor-parallel degree is at least 1.")
        state = part_states(self.trainable, checkpointing=checkpointing)[check_part(part)]
        count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
        squares = np.atleast_1d(np.asarray(pairs, dtype=np.float64))
        degree = tp if part in ("vision_layer", "llm_layer", "llm_head") else 1
        found = self._measured(part, count, squares, state, checkpointing, degree)
        if found is not None:
            return found
        goal = self._roofline(part, count, squares, state, checkpointing, degree)
        near = self._nearest(part, state)
        if near is None:
            beyond = np.zeros(count.shape, dtype=bool)
            return PartSeconds(
                forward_s=goal[0],
                backward_s=goal[1],
                source="roofline",
                relative_error=_ERROR_OF_ROOFLINE,
                is_beyond=beyond,
            )
        known = self._measured(part, count, squares, near.state, near.checkpointing, near.tp)
        assert known is not None
        base = self._roofline(part, count, squares, near.state, near.checkpointing, near.tp)
        forward = known.forward_s * _ratio(goal[0], base[0])
        # where the known setting has no backward, it is so many times the forward as the roofline says
        backward = np.where(
            base[1] > 0, known.backward_s * _ratio(goal[1], base[1]), forward * _ratio(goal[1], goal[0], default=0.0)
        )
        return PartSeconds(
            forward_s=forward,
            backward_s=backward,
            source="scaled",
            relative_error=max(known.relative_error, 0.25),
            is_beyond=known.is_beyond,
        )

    def _measured(
        self, part: str, tokens: FloatArray, pairs: FloatArray, state: PartState, checkpointing: bool, tp: int
    ) -> PartSeconds | None:
        if self.profile is None:
            return None
        both: list[FloatArray] = []
        beyond = np.zeros(tokens.shape, dtype=bool)
        directions: tuple[Direction, ...] = ("forward", "backward")
        for direction in directions:
            setting = {"state": state, "checkpointing": checkpointing, "tp": tp}
            seconds = self.profile.part_seconds(part, direction, tokens, pairs, **setting)  # type: ignore[arg-type]
            curves = self.profile.part_curves(part, direction, **setting)  # type: ignore[arg-type]
            if seconds is None or curves is None:
                return None
            both.append(seconds * self._read_share(part, direction))
            if direction == "forward":
                beyond = np.any([curve.is_beyond(tokens, pairs) for _, curve in curves], axis=0)
        errors = self.profile.relative_errors(group=GROUP_OF_PART[part])
        return PartSeconds(
            forward_s=both[0],
            backward_s=both[1],
            source="measured",
            relative_error=float(np.percentile(errors, 95)) if errors.size else _ERROR_OF_ROOFLINE,
            is_beyond=beyond,
        )

    def _nearest(self, part: str, state: PartState) -> Measurement | None:
        """A measured point of the part in the setting that is nearest: same state, then tp = 1."""
        if self.profile is None:
            return None
        group = GROUP_OF_PART[part]
        points = [point for point in self.profile.measurements if point.group == group and not point.held_out]
        return min(points, key=lambda p: (p.state != state, p.checkpointing, p.tp), default=None)

    def _roofline(
        self, part: str, tokens: FloatArray, pairs: FloatArray, state: PartState, checkpointing: bool, tp: int
    ) -> tuple[FloatArray, FloatArray]:
        """Forward and backward seconds from FLOPs and bytes alone."""
        weights, attention = part_flops(self.spec, part, tokens, pairs, tp=tp, causal_factor=self.causal_factor)
        size = dtype_bytes(self.dtype)
        module = self.spec.vision if part.startswith("vision") else self.spec.llm
        width = self.spec.llm.vocab / tp if part == "llm_head" else module.hidden
        moved = size * (parameter_counts(self.spec, tp=tp)[part] * (part != "llm_fixed") + 8.0 * width * tokens)
        forward = np.maximum((weights + attention) / self.flops_per_s, moved / self.bytes_per_s)
        layered = part.endswith("_layer")
        of_weights, of_attention = _backward_factors(state, recomputes=checkpointing, shared_weights=layered)
        work = of_weights * weights + of_attention * attention
        backward = np.maximum(work / self.flops_per_s, of_weights * moved / self.bytes_per_s)
        backward = backward * self._read_share(part, "backward")
        nothing = tokens == 0
        return np.where(nothing, 0.0, forward), np.where(nothing, 0.0, backward)

    def _read_share(self, part: str, direction: Direction) -> float:
        """Share of the encoder's layers that the direction passes: none above the one that is read has a backward."""
        if part != "vision_layer" or direction == "forward":
            return 1.0
        return 1.0 - self.spec.unread_vision_layers / self.spec.vision.num_layers


def _ratio(above: FloatArray, below: FloatArray, *, default: float = 1.0) -> FloatArray:
    return np.divide(above, below, out=np.full_like(above, default), where=below > 0)
