"""One measured point: a group of parts, run at some depth on a microbatch of some size; and what is fitted to many.

Groups are what can be timed alone: `vision` (encoder: its layers and what is fixed in it), `connector`, `llm` (the
decoder without its head) and `llm_head` (LM head and loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from hf_dflop.cost.activations import PartMemory
from hf_dflop.cost.curves import Curve, fit_curves
from hf_dflop.cost.fit import nnls
from hf_dflop.cost.parts import PartState
from hf_dflop.errors import ModelError

__all__ = ["GROUPS", "GROUP_OF_PART", "Direction", "Measurement", "group_curves", "group_memory"]

Direction = Literal["forward", "backward"]

GROUP_OF_PART = {
    "vision_fixed": "vision",
    "vision_layer": "vision",
    "connector": "connector",
    "llm_fixed": "llm",
    "llm_layer": "llm",
    "llm_head": "llm_head",
}
GROUPS: tuple[str, ...] = ("vision", "connector", "llm", "llm_head")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Seconds and bytes of one size.

    Raises:
        ModelError: an unknown group, no tokens, or seconds that are not positive.
    """

    group: str
    """One of `GROUPS`."""
    kind: int = 0
    """Which kind of layer ran (windowed or global, dense or experts), an index into the profile's `layer_kinds`."""
    tp: int = 1
    """The shard of one of this many tensor-parallel ranks ran, without the communication between them."""
    state: PartState = "trained"
    checkpointing: bool = False
    depth: int = 0
    """Layers that ran; 0 for groups without layers."""
    num_sequences: int
    """Attention sequences: tiles of the encoder, rows of the LLM."""
    tokens: int
    """Positions of all sequences."""
    pairs: int
    """Sum over the sequences of length²."""
    forward_s: float
    """Median of the repeats."""
    forward_spread_s: float
    """Interquartile range of the repeats."""
    backward_s: float
    """0 where no gradient passes."""
    backward_spread_s: float
    kept_bytes: float
    """Allocated by the forward and still alive after it."""
    extra_bytes: float
    """Peak of forward and backward beyond `kept_bytes`; gradients of parameters not included."""
    num_repeats: int
    cpu_share: float = 1.0
    """Of these seconds, the share in which the measuring process had the CPU: below 1 others disturbed it."""
    held_out: bool = False
    """Never fitted: the error is told on these."""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ModelError(f"a measurement is of the group {self.group!r}; the groups are {', '.join(GROUPS)}.")
        if self.tokens < 1 or self.num_sequences < 1 or self.depth < 0 or self.tp < 1:
            raise ModelError(f"a measurement has {self.tokens} tokens at depth {self.depth}; drop it.")
        if not (0 < self.forward_s < np.inf and 0 <= self.backward_s < np.inf):
            raise ModelError(f"a measurement took {self.forward_s} and {self.backward_s} seconds; drop it.")

    @property
    def setting(self) -> tuple[str, int, int, PartState, bool]:
        """What separates curves: group, kind, tp, state, checkpointing."""
        return self.group, self.kind, self.tp, self.state, self.checkpointing

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s

    @property
    def is_disturbed(self) -> bool:
        """The repeats scatter by more than 6 per cent, or others had the CPU for more than 4 per cent of the time."""
        return self.forward_spread_s + self.backward_spread_s > 0.06 * self.total_s or self.cpu_share < 0.96

    def seconds(self, direction: Direction) -> float:
        return self.forward_s if direction == "forward" else self.backward_s


@lru_cache(maxsize=512)
def group_curves(points: tuple[Measurement, ...], direction: Direction) -> tuple[Curve, Curve]:
    """Curves of seconds of one layer and of what is fixed, from points of one setting (none held out).

    Where nothing happens in a direction (a frozen part has no backward) both are 0.

    Raises:
        ModelError: no points.
    """
    if points and not any(point.seconds(direction) for point in points):
        return Curve(), Curve()
    return fit_curves(
        [point.tokens for point in points],
        [point.pairs for point in points],
        [point.depth for point in points],
        [point.seconds(direction) for point in points],
    )


@lru_cache(maxsize=512)
def group_memory(points: tuple[Measurement, ...]) -> tuple[PartMemory, PartMemory]:
    """Activation bytes of one layer and of what is fixed, from points of one setting.

    Kept bytes are exact counts, so a plain linear fit is: `tokens · (a + depth · b) + depth · pairs · c`. What is
    needed beside them does not grow with depth, and belongs to the layer where there is one.
    """
    tokens, pairs, depth, kept, extra = (
        np.asarray([getattr(point, name) for point in points], dtype=np.float64)
        for name in ("tokens", "pairs", "depth", "kept_bytes", "extra_bytes")
    )
    a, b, c = _non_negative([tokens, depth * tokens, depth * pairs], kept)
    extra_token, extra_pair = _non_negative([tokens, pairs], extra)
    if not depth.any():
        return PartMemory(), PartMemory(kept_per_token_bytes=a, extra_per_token_bytes=_largest(extra / tokens))
    layer = PartMemory(
        kept_per_token_bytes=b,
        kept_per_pair_bytes=c,
        extra_per_token_bytes=extra_token,
        extra_per_pair_bytes=extra_pair,
    )
    return layer, PartMemory(kept_per_token_bytes=a)


def _largest(values: "np.ndarray") -> float:
    return float(values.max(initial=0.0))


def _non_negative(columns: Sequence["np.ndarray"], target: "np.ndarray") -> list[float]:
    matrix = np.stack(columns, axis=1)
    weight = 1.0 / np.maximum(target, max(float(target.max(initial=0.0)) * 1e-6, 1e-300))
    matrix, target = matrix * weight[:, None], target * weight
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    return [float(value) for value in nnls(matrix / scale, target) / scale]
