"""A model profile that was made from a known law: JSON, costs of parts, the cost model, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_dflop.cost import CostModel, ModelProfile, ModelSpec, PartCosts, Trainable
from hf_dflop.cost.measurement import Measurement
from hf_dflop.cost.part_seconds import part_flops
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

RATES = {"vision": 1e-6, "llm": 2e-6, "connector": 3e-7, "llm_head": 5e-7}


def _point(group: str, num_sequences: int, length: int, depth: int, **setting: object) -> Measurement:
    """Each layer (or part without layers) takes a rate per token and 1e-9 a pair; 1e-4 is fixed."""
    tokens, pairs = num_sequences * length, num_sequences * length**2
    forward = 1e-4 + max(depth, 1) * RATES[group] * tokens + depth * 1e-9 * pairs
    return Measurement(
        group=group,
        depth=depth,
        num_sequences=num_sequences,
        tokens=tokens,
        pairs=pairs,
        forward_s=forward,
        forward_spread_s=0.0,
        backward_s=2 * forward,
        backward_spread_s=0.0,
        kept_bytes=tokens * (10 + 100 * depth),
        extra_bytes=tokens * 50,
        num_repeats=5,
        **setting,  # type: ignore[arg-type]
    )


@pytest.fixture
def profile(spec: ModelSpec) -> ModelProfile:
    sizes = [(1, 64), (1, 256), (1, 1024), (4, 64), (16, 64)]
    points = [_point(group, *size, depth) for group in ("vision", "llm") for size in sizes for depth in (1, 3)]
    points += [_point(group, *size, 0) for group in ("connector", "llm_head") for size in sizes]
    points += [_point("llm", 3, 200, 4, held_out=True), _point("vision", 2, 300, 2, held_out=True)]
    return ModelProfile(
        spec=spec, layer_kinds={"vision": (1,), "llm": (2,)}, measurements=tuple(points), versions={"torch": "2"}
    )


def test_json_and_held_out_error(profile: ModelProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    assert ModelProfile.load(tmp_path / "profile.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert profile.error is not None
    assert profile.error.num_held_out == 2
    assert profile.error.p95 < 0.02
    wrong = replace(profile, measurements=(*profile.measurements, _point("llm", 1, 512, 8, held_out=True)))
    slow = replace(wrong.measurements[-1], forward_s=1.0)
    errors = replace(wrong, measurements=(*profile.measurements, slow)).relative_errors("forward", group="llm")
    assert errors.max() > 0.9  # a point that is off is told


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ModelError, match="hf-dflop measure"):
        ModelProfile.load(tmp_path / "profile.json")


def test_measured_parts(profile: ModelProfile) -> None:
    costs = PartCosts(spec=profile.spec, profile=profile, dtype="float32")
    layer = costs.seconds("llm_layer", [600], [3 * 200**2])
    assert layer.source == "measured"
    np.testing.assert_allclose(layer.forward_s, [600 * 2e-6 + 3 * 200**2 * 1e-9], rtol=0.03)
    np.testing.assert_allclose(layer.backward_s, 2 * layer.forward_s, rtol=0.03)
    assert layer.is_beyond.tolist() == [False]
    assert costs.seconds("llm_layer", [600, 2048], [3 * 200**2, 2048**2]).is_beyond.tolist() == [False, True]
    np.testing.assert_allclose(costs.seconds("llm_head", [300], [0]).forward_s, [1e-4 + 300 * 5e-7], rtol=0.03)


def test_other_settings_are_scaled_by_their_flops(profile: ModelProfile) -> None:
    rate = 1e9
    costs = PartCosts(spec=profile.spec, profile=profile, flops_per_s=rate, bytes_per_s=1e15, dtype="float32")
    size = ([512], [512**2])
    whole, again = (costs.seconds("llm_layer", *size, checkpointing=on) for on in (False, True))
    assert (again.source, whole.source) == ("scaled", "measured")
    np.testing.assert_allclose(again.forward_s, whole.forward_s)
    np.testing.assert_allclose(again.backward_s, 1.5 * whole.backward_s, rtol=1e-6)
    frozen = replace(costs, trainable=Trainable(vision=False))
    vision = frozen.seconds("vision_layer", *size)
    np.testing.assert_allclose(vision.backward_s, [0.0])
    np.testing.assert_allclose(vision.forward_s, costs.seconds("vision_layer", *size).forward_s)


def test_roofline_where_nothing_was_measured(spec: ModelSpec) -> None:
    costs = PartCosts(spec=spec, flops_per_s=1e6, bytes_per_s=1e15, dtype="float32")
    found = costs.seconds("llm_layer", [10], [100])
    weights, attention = part_flops(spec, "llm_layer", [10], [100])
    # 2 · 6 · 2 · (3 + 1) · 2 in attention matrices, 2 · 3 · 6 · 10 in the MLP; half of 4 · 3 · 2 a pair
    assert (weights.tolist(), attention.tolist()) == ([10 * (192 + 360)], [0.5 * 24 * 100])
    np.testing.assert_allclose(found.forward_s, (weights + attention) / 1e6)
    np.testing.assert_allclose(found.backward_s, 2 * found.forward_s)
    assert found.source == "roofline"
    slow = replace(costs, bytes_per_s=1.0).seconds("llm_layer", [10], [100])
    assert slow.forward_s[0] == pytest.approx(4 * (288 + 8 * 6 * 10))
    assert costs.seconds("connector", [0], [0]).total_s.tolist() == [0.0]
    with pytest.raises(ModelError, match="not a part"):
        costs.seconds("tower", [1], [1])
    with pytest.raises(ModelError, match="tp=0"):
        costs.seconds("llm_layer", [1], [1], tp=0)


def test_cost_model_from_profile(profile: ModelProfile) -> None:
    cost = CostModel.from_profile(profile)
    assert CostModel.from_json(cost.to_json()) == cost
    assert cost.fit_error == profile.error
    shapes = Shapes(
        num_images=[2, 0, 1],
        image_tiles=[2, 0, 1],
        image_patches=[600, 0, 500],
        image_patches_sq=[180_000, 0, 250_000],
        image_tokens=[100, 0, 50],
        text_tokens=[200, 700, 30],
        label_tokens=[9, 9, 9],
    )
    # forward + backward is 3 times the law; a class token for each tile; one vision layer, two LLM layers
    positions, pairs = np.asarray([602.0, 0, 501]), np.asarray([2 * 301.0**2, 0, 501**2])
    np.testing.assert_allclose(cost.vision_s(shapes), 3 * (1.3e-6 * positions + 1e-9 * pairs), rtol=0.03, atol=1e-9)
    tokens = np.asarray([300.0, 700, 80])
    np.testing.assert_allclose(cost.llm_s(shapes), 3 * ((2 * 2e-6 + 5e-7) * tokens + 2e-9 * tokens**2), rtol=0.03)
    assert cost.per_microbatch_s == pytest.approx(3 * 4e-4, rel=0.15)  # vision, connector, LLM, head
    assert (np.diff(cost.llm_s(np.arange(1, 2000))) > 0).all()
    seconds = cost.microbatch_seconds(shapes, [[0, 1], [2]], padded=True)
    np.testing.assert_allclose(seconds[1], cost.vision_s(shapes)[2] + cost.llm_s([80])[0] + cost.per_microbatch_s)


def test_a_profile_without_a_module_is_refused(profile: ModelProfile) -> None:
    half = replace(profile, measurements=tuple(p for p in profile.measurements if p.group != "vision"))
    with pytest.raises(ModelError, match="no measurement of the vision"):
        CostModel.from_profile(half)


def test_merging_keeps_every_point_once(profile: ModelProfile) -> None:
    second = replace(profile, measurements=(_point("llm", 1, 64, 1, tp=2), profile.measurements[0]))
    both = profile.merge(second)
    assert len(both.measurements) == len(profile.measurements) + 1
    assert both.points("llm", tp=2) == second.measurements[:1]
    with pytest.raises(ModelError, match="device"):
        profile.merge(replace(profile, device="another"))


def test_kinds_of_layers_are_weighted(profile: ModelProfile) -> None:
    slow = tuple(
        replace(point, kind=1, forward_s=point.forward_s + point.depth * 2e-6 * point.tokens)
        for point in profile.measurements
        if point.group == "llm" and not point.held_out
    )
    mixed = replace(profile, layer_kinds={"vision": (1,), "llm": (3, 1)}, measurements=(*profile.measurements, *slow))
    size = ([512], [512 * 64])
    alone, mean = (one.part_seconds("llm_layer", "forward", *size, state="trained") for one in (profile, mixed))
    assert alone is not None
    assert mean is not None
    np.testing.assert_allclose(mean - alone, [0.25 * 2e-6 * 512], rtol=0.05)


def test_the_cost_model_follows_how_the_run_trains(profile: ModelProfile) -> None:
    cost = CostModel.from_profile(profile)
    again = replace(cost, checkpointing=True)
    size = ([300.0], [300.0**2])
    np.testing.assert_allclose(again.measured_s("llm", "forward", *size), cost.measured_s("llm", "forward", *size))
    more = again.measured_s("llm", "backward", *size) / cost.measured_s("llm", "backward", *size)
    assert 1.4 < more[0] < 1.55  # one forward more on top of two
    frozen = replace(cost, trainable=Trainable(vision=False, connector=False))
    assert frozen.measured_s("vision", "backward", *size).tolist() == [0.0]
    assert CostModel.analytic(profile.spec).profile is None
    with pytest.raises(ModelError, match="from_profile"):
        CostModel.analytic(profile.spec).measured_s("llm", "forward", *size)


def test_a_profile_is_a_cost_model_to_whom_reads_one(profile: ModelProfile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    CostModel.from_profile(profile).save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "profile.json") == CostModel.load(tmp_path / "cost.json")
