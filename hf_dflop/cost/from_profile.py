"""From a `ModelProfile` to a `CostModel`: one curve for encoder and connector, one for the LLM.

Costs of samples must add up, so what a module takes over the tokens of a whole microbatch becomes a line (through a
quarter of the largest measured size and the largest), whose base is paid once a microbatch; what attention takes over
the length of a sequence stays a curve.

Assumption: microbatches are of a quarter of the largest measured size or more; smaller ones are priced a little high
or low, by as much as their kernels are slower.
"""

import numpy as np

from hf_dflop.cost.curves import Curve
from hf_dflop.cost.flops import Trainable
from hf_dflop.cost.measurement import GROUP_OF_PART
from hf_dflop.cost.model import CostModel, Rates
from hf_dflop.cost.model_profile import ModelProfile
from hf_dflop.cost.part_seconds import PartCosts, part_flops
from hf_dflop.errors import ModelError

__all__ = ["cost_model_of"]

_MODULES = {
    "vision": ("vision_fixed", "vision_layer", "connector"),
    "llm": ("llm_fixed", "llm_layer", "llm_head"),
}


def cost_model_of(profile: ModelProfile, *, trainable: Trainable, checkpointing: bool) -> CostModel:
    """See [`CostModel.from_profile`]."""
    for module in _MODULES:
        if not any(point.group == module for point in profile.measurements):
            raise ModelError(
                f"the model profile has no measurement of the {module}. Measure the whole model: hf-dflop measure."
            )
    costs = PartCosts(
        spec=profile.spec, profile=profile, trainable=trainable, dtype=profile.dtype, flops_per_s=_rate(profile)
    )
    base = {module: _line_and_lengths(costs, module, checkpointing) for module in _MODULES}
    rate = costs.flops_per_s
    return CostModel(
        spec=profile.spec,
        rates=Rates(vision_linear=rate, vision_attention=rate, llm_linear=rate, llm_attention=rate),
        trainable=trainable,
        checkpointing=checkpointing,
        per_microbatch_s=sum(overhead for overhead, _ in base.values()),
        fit_error=profile.error,
        vision_curve=base["vision"][1],
        llm_curve=base["llm"][1],
    )


def _rate(profile: ModelProfile) -> float:
    """FLOP/s that the largest measured run of the LLM's layers reached."""
    points = [point for point in profile.measurements if point.group == "llm" and not point.held_out]
    largest = max(points, key=lambda point: point.tokens * point.depth)
    weights, attention = part_flops(
        profile.spec, "llm_layer", [largest.tokens], [largest.pairs], tp=largest.tp, causal_factor=0.5
    )
    return float((weights + attention)[0]) * largest.depth / largest.forward_s


def _total(costs: PartCosts, module: str, checkpointing: bool, tokens: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Forward + backward seconds of all parts of a module, `(num,)`."""
    layers = costs.spec.vision.num_layers if module == "vision" else costs.spec.llm.num_layers
    seconds = np.zeros(len(tokens))
    for part in _MODULES[module]:
        copies = layers if part.endswith("_layer") else 1
        seconds += copies * costs.seconds(part, tokens, pairs, checkpointing=checkpointing).total_s
    return seconds


def _line_and_lengths(costs: PartCosts, module: str, checkpointing: bool) -> tuple[float, Curve]:
    """Base of a microbatch, and the curve of its samples.

    The seconds of a microbatch of n tokens in sequences of length L are f(n) + n · h(L); h comes out by varying L at
    one n, f by varying n at one L.
    """
    assert costs.profile is not None
    points = [
        point
        for point in costs.profile.measurements
        if GROUP_OF_PART[f"{module}_layer"] == point.group and not point.held_out
    ]
    largest = float(max(point.tokens for point in points))
    lengths = sorted({point.tokens / point.num_sequences for point in points})
    fixed_tiles = len(lengths) == 1
    lengths = [lengths[0] / 4, lengths[0] / 2, *lengths] if not fixed_tiles else lengths
    sizes = np.asarray([largest / 4, largest])
    at_shortest = _total(costs, module, checkpointing, sizes, sizes * lengths[0])
    slope = max(float(at_shortest[1] - at_shortest[0]) / (0.75 * largest), 0.0)
    base = max(float(at_shortest[1]) - slope * largest, 0.0)
    if fixed_tiles:
        return base, Curve(token_knots=(largest,), token_slopes=(slope,))
    knots = np.asarray(lengths)
    seconds = _total(costs, module, checkpointing, np.full(knots.size, largest), largest * knots)
    per_token = np.maximum.accumulate(seconds) / largest
    rises = np.diff(np.concatenate([[per_token[0]], per_token])) / np.diff(np.concatenate([[0.0], knots]))
    rises[0] = rises[1]  # below the shortest sequence attention goes down to nothing in the same way
    slope = max(slope - rises[0] * knots[0], 0.0)  # what attention took at the shortest length is in the line too
    return base, Curve(
        token_knots=(largest,), token_slopes=(slope,), length_knots=tuple(knots), length_slopes=tuple(rises)
    )
