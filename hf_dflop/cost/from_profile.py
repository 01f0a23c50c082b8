"""From a `ModelProfile` to costs of samples: a base and a curve for encoder, LLM and LM head, forward and backward.

Costs of samples must add up, so what a module takes over the tokens of a whole microbatch becomes a line (through a
quarter of the largest measured size and the largest), whose base is paid once a microbatch; what attention takes over
the length of a sequence stays a curve.

Assumption: microbatches are of a quarter of the largest measured size or more; smaller ones are priced a little high
or low, by as much as their kernels are slower.
"""

from functools import lru_cache

import numpy as np

from hf_dflop.cost.curves import Curve
from hf_dflop.cost.flops import Trainable
from hf_dflop.cost.measurement import GROUP_OF_PART, Direction
from hf_dflop.cost.model_profile import ModelProfile
from hf_dflop.cost.part_seconds import PartCosts, part_flops
from hf_dflop.errors import ModelError

__all__ = ["DIRECTIONS", "SampleCurves", "reached_flops_per_s", "sample_curves"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
_PARTS = {
    "vision": ("vision_fixed", "vision_layer", "connector"),
    "llm": ("llm_fixed", "llm_layer"),
    "llm_head": ("llm_head",),
}
SampleCurves = dict[tuple[str, Direction], tuple[float, Curve]]
"""(`vision` with connector, `llm` or `llm_head`; direction) -> seconds of every microbatch, curve of its samples."""


@lru_cache(maxsize=64)
def sample_curves(profile: ModelProfile, trainable: Trainable, checkpointing: bool) -> SampleCurves:
    """Curves of samples for a way of training; what was not measured is scaled from what was, by its FLOPs.

    Raises:
        ModelError: a module was not measured in any setting.
    """
    for module, parts in _PARTS.items():
        if not any(point.group == GROUP_OF_PART[parts[-2:][0]] for point in profile.measurements):
            raise ModelError(
                f"the model profile has no measurement of the {module}. Measure the whole model: hf-dflop measure."
            )
    costs = PartCosts(
        spec=profile.spec,
        profile=profile,
        trainable=trainable,
        dtype=profile.dtype,
        flops_per_s=reached_flops_per_s(profile),
    )
    return {
        (module, direction): _line_and_lengths(costs, module, direction, checkpointing)
        for module in _PARTS
        for direction in DIRECTIONS
    }


def reached_flops_per_s(profile: ModelProfile) -> float:
    """FLOP/s that the largest measured run of the LLM's layers reached."""
    points = [point for point in profile.measurements if point.group == "llm" and not point.held_out]
    if not points:
        raise ModelError("the model profile has no measurement of the llm. Measure the whole model: hf-dflop measure.")
    largest = max(points, key=lambda point: point.tokens * point.depth)
    weights, attention = part_flops(profile.spec, "llm_layer", [largest.tokens], [largest.pairs], tp=largest.tp)
    return float((weights + attention)[0]) * largest.depth / largest.forward_s


def _total(
    costs: PartCosts, module: str, direction: Direction, checkpointing: bool, tokens: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
    """Seconds of all parts of a module, `(num,)`."""
    layers = costs.spec.vision.num_layers if module == "vision" else costs.spec.llm.num_layers
    seconds = np.zeros(len(tokens))
    for part in _PARTS[module]:
        found = costs.seconds(part, tokens, pairs, checkpointing=checkpointing)
        copies = layers if part.endswith("_layer") else 1
        seconds += copies * (found.forward_s if direction == "forward" else found.backward_s)
    return seconds


def _line_and_lengths(costs: PartCosts, module: str, direction: Direction, checkpointing: bool) -> tuple[float, Curve]:
    """Base of a microbatch, and the curve of its samples.

    The seconds of a microbatch of n tokens in sequences of length L are f(n) + n · h(L); h comes out by varying L at
    one n, f by varying n at one L.
    """
    assert costs.profile is not None
    group = GROUP_OF_PART[_PARTS[module][-2:][0]]
    points = [point for point in costs.profile.measurements if point.group == group and not point.held_out]
    largest = float(max(point.tokens for point in points))
    knots = np.asarray(sorted({point.tokens / point.num_sequences for point in points}))
    sizes = np.asarray([largest / 4, largest])
    low, high = _total(costs, module, direction, checkpointing, sizes, sizes * knots[0])
    slope = max(float(high - low) / (0.75 * largest), 0.0)
    base = max(float(high) - slope * largest, 0.0)
    if knots.size == 1:
        return base, Curve(token_knots=(largest,), token_slopes=(slope,))
    seconds = _total(costs, module, direction, checkpointing, np.full(knots.size, largest), largest * knots)
    rises = np.diff(np.maximum.accumulate(seconds) / largest) / np.diff(knots)
    rises = np.concatenate([rises[:1], rises])  # shorter than any that was measured: down to nothing in the same way
    slope = max(slope - float(rises[0] * knots[0]), 0.0)  # what attention took at the shortest length is in the line
    return base, Curve(
        token_knots=(largest,), token_slopes=(slope,), length_knots=tuple(knots), length_slopes=tuple(rises)
    )
