"""A planner that is given measured costs prices stages by them, as the plan trains."""

from dataclasses import replace

import numpy as np

from hf_dflop.cost import CostModel, ModelProfile, ModelSpec
from hf_dflop.cost.measurement import Measurement
from hf_dflop.cost.spec import ConnectorSpec, TransformerSpec
from hf_dflop.plan import ModulePlan, Plan
from hf_dflop.plan.stage_seconds import sample_seconds
from hf_dflop.shapes import Shapes

SIZE = {"hidden": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "intermediate": 32, "gated_mlp": False}
SPEC = ModelSpec(
    vision=TransformerSpec(**SIZE, num_layers=2),
    connector=ConnectorSpec(merge=1, linears=((16, 16),)),
    llm=TransformerSpec(**SIZE, num_layers=4, vocab=64),
    patch_size=14,
)
SHAPES = Shapes(
    num_images=[1, 0],
    image_tiles=[1, 0],
    image_patches=[200, 0],
    image_patches_sq=[40_000, 0],
    image_tokens=[200, 0],
    text_tokens=[100, 400],
    label_tokens=[9, 9],
)


def _point(group: str, count: int, length: int, depth: int) -> Measurement:
    """A microsecond per token for each layer, and for each part without layers; backward three times that."""
    tokens = count * length
    seconds = 1e-6 * tokens * max(depth, 1)
    return Measurement(
        group=group,
        depth=depth,
        num_sequences=count,
        tokens=tokens,
        pairs=tokens * length,
        forward_s=seconds,
        forward_spread_s=0.0,
        backward_s=3 * seconds,
        backward_spread_s=0.0,
        kept_bytes=1.0,
        extra_bytes=0.0,
        num_repeats=3,
    )


def _cost() -> CostModel:
    sizes = [(1, 64), (1, 512), (8, 64)]
    points = [_point(group, *size, depth) for group in ("vision", "llm") for size in sizes for depth in (1, 3)]
    points += [_point(group, *size, 0) for group in ("connector", "llm_head") for size in sizes]
    profile = ModelProfile(spec=SPEC, layer_kinds={"vision": (2,), "llm": (4,)}, measurements=tuple(points))
    return CostModel.from_profile(profile)


def test_stages_take_the_measured_seconds() -> None:
    plan = Plan(vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(4,)), num_microbatches=1)
    found = sample_seconds(plan, _cost(), SHAPES)
    np.testing.assert_allclose(found.vision_forward, [200 * 3e-6, 0], rtol=0.02)  # two layers and the connector
    np.testing.assert_allclose(found.vision_backward, [200 * 9e-6, 0], rtol=0.02)
    np.testing.assert_allclose(found.llm_forward, [300 * 4e-6, 400 * 4e-6], rtol=0.02)
    np.testing.assert_allclose(found.llm_backward, [300 * 12e-6, 400 * 12e-6], rtol=0.02)
    np.testing.assert_allclose(found.head_forward, [300e-6, 400e-6], rtol=0.02)
    frozen = sample_seconds(replace(plan, frozen=("vision", "connector")), _cost(), SHAPES)
    np.testing.assert_allclose(frozen.vision_backward, [0, 0])
    np.testing.assert_allclose(frozen.llm_backward, found.llm_backward)
