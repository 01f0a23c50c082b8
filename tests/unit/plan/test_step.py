"""A plan's step: nothing of its seconds is lost, images are shared as the pipeline shares them, balance pays."""

from dataclasses import replace

import numpy as np
import pytest

from hf_dflop.errors import PlanError
from hf_dflop.plan import Calibration, ModulePlan, Network, plan_step, simulate_order
from hf_dflop.plan.stage_seconds import sample_seconds, share_images, stage_seconds
from hf_dflop.plan.step import calibrated, plan_stage_ranks, stock_groups
from tests.unit.plan import example

NETWORK = Network(intra_bytes_per_s=1e9, inter_bytes_per_s=1e8, gpus_per_node=4, latency_s=1e-5)
LAYOUTS = {
    "replicated": example.replicated(),
    "fsdp": example.replicated(fsdp_shards=2),
    "disjoint": example.plan(schedule="data-aware"),
    "colocated": example.plan(placement="colocated", vision=ModulePlan(layers=(6,), dp=3), schedule="zero-bubble"),
    "interleaved": example.plan(llm=ModulePlan(layers=(2, 2, 3, 1), num_chunks=2, dp=3), schedule="interleaved"),
    "split encoder": example.plan(vision=ModulePlan(layers=(2, 4), dp=2)),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stages_of_a_microbatch_sum_to_its_cost(layout: str, padded: bool) -> None:
    plan = example.plan(
        **{f: getattr(LAYOUTS[layout], f) for f in ("placement", "vision", "llm", "fsdp_shards")}, padded=padded
    )
    data, cost = example.shapes(48), example.cost(per_microbatch_s=0.002)
    groups = stock_groups(48, plan.llm.dp, plan.num_microbatches)
    stages = stage_seconds(plan, sample_seconds(plan, cost, data), data, groups)
    total = sum(rows.sum() for rows in (*stages.forward, *stages.backward))
    flat = [group for rank in groups for group in rank]
    wanted = cost.microbatch_module_seconds(data, flat, padded=padded).sum()
    if plan.vision.dp == plan.llm.dp:  # otherwise an encoder replica runs parts of several microbatches
        assert total == pytest.approx(wanted + 0.002 * len(flat))
    exact = stage_seconds(plan, sample_seconds(plan, example.cost(), data), data, groups)
    assert sum(rows.sum() for rows in (*exact.forward, *exact.backward)) == pytest.approx(wanted)


def test_layers_and_shards_divide_seconds() -> None:
    data, cost = example.shapes(48), example.cost()
    whole = example.plan(llm=ModulePlan(layers=(6, 2), dp=3))
    half = example.plan(llm=ModulePlan(layers=(6, 2), dp=3, tp=2))
    groups = stock_groups(48, 3, 4)
    seconds = sample_seconds(whole, cost, data)
    first = stage_seconds(whole, seconds, data, groups)
    second = stage_seconds(half, seconds, data, groups)
    assert second.forward[1] == pytest.approx(first.forward[1] / 2)
    layers = first.forward[1] / 6 * 2
    head = np.array([[seconds.head_forward[g].sum() for g in rank] for rank in groups])
    assert first.forward[2] == pytest.approx(layers + head)


def test_frozen_and_cached_encoders() -> None:
    data, cost = example.shapes(48), example.cost()
    frozen = sample_seconds(example.plan(frozen=("vision", "connector")), cost, data)
    assert not frozen.vision_backward.any()
    assert frozen.vision_forward.sum() == pytest.approx(
        sample_seconds(example.plan(), cost, data).vision_forward.sum()
    )
    cached = example.plan(frozen=("vision",), cached_features=True)
    assert not sample_seconds(cached, cost, data).vision.any()
    step = plan_step(example.plan(frozen=("vision", "connector")), cost, data)
    assert {str(action)[1] for action in step.order[0]} == {"F"}


def test_images_are_shared_by_whole_samples() -> None:
    data = example.shapes(6)
    rows = [64, 0, 128, 64, 192, 0]
    data = type(data)(**{**{f: getattr(data, f) for f in data.__slots__}, "image_tokens": rows})
    owner, forward, backward = share_images(data, [[[0, 1, 2]], [[3, 4, 5]]], 2, own=False)
    # middles at 32, 128, 224, 352 of 448 rows: halves at 224
    assert owner.tolist() == [0, -1, 0, 1, 1, -1]
    assert forward[:, 0].tolist() == [[0, 1], [1, 2]]
    assert backward[:, 0].tolist() == [[0, 1], [1, 2]]
    owner, forward, _ = share_images(data, [[[0, 1, 2]], [[3, 4, 5]]], 1, own=False)
    assert forward[:, 0].tolist() == [[0, 1], [0, 1]]
    _, forward, _ = share_images(data, [[[1]], [[5]]], 2, own=False)
    assert forward[:, 0].tolist() == [[0, 0], [0, 0]], "no image, nobody to wait for"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_plays_and_balance_is_no_loss(layout: str) -> None:
    planned = LAYOUTS[layout]
    fields = {f: getattr(planned, f) for f in planned.__slots__}
    seconds = {}
    for balance in (False, True):
        plan = type(planned)(**(fields | {"balance": balance}))
        total = 0.0
        for seed in range(3):
            data = example.shapes(plan.global_batch_size, seed)
            step = plan_step(
                plan, example.cost(), data, communication=NETWORK, optimizer_s=0.001, seed=seed, work=50_000
            )
            flat = sorted(int(i) for rank in step.groups for group in rank for i in group)
            assert flat == list(range(plan.global_batch_size))
            timeline = simulate_order(step.order, step.durations)
            assert len(timeline.lines) * max(plan.llm.tp, 1) == plan.num_ranks
            total += timeline.step_s
        seconds[balance] = total
    assert seconds[True] < seconds[False]


def test_communication_costs_time() -> None:
    data, plan = example.shapes(48), example.plan()
    quiet = plan_step(plan, example.cost(), data, work=1)
    slow = Network(intra_bytes_per_s=1e6, inter_bytes_per_s=1e6)
    loud = plan_step(plan, example.cost(), data, communication=slow, work=1)
    assert simulate_order(loud.order, loud.durations).step_s > simulate_order(quiet.order, quiet.durations).step_s
    tokens = loud.llm_tokens[1, 2]
    assert loud.durations.transfer[0, 1, 1, 2] == pytest.approx(tokens * 128 * 2 / 1e6)
    assert not loud.durations.transfer[0, 2].any(), "the last stage sends nothing on"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "fsdp"])  # which has no copies to sum
def test_what_hides_the_sum_of_gradients_is_what_runs_the_plan(layout: str) -> None:
    """The pipeline engine sums after its last backward; DDP and FSDP beside it, but for the last bucket."""
    plan, data = LAYOUTS[layout], example.shapes(48)
    batch = data.select(range(plan.global_batch_size))

    def played(by_pipeline: bool | None) -> tuple[np.ndarray, np.ndarray, float]:
        step = plan_step(plan, big, batch, communication=NETWORK, work=1, by_pipeline=by_pipeline)
        found = step.durations
        return found.reduce_s, found.reduce_tail_s, simulate_order(step.order, found).step_s

    big = example.cost()
    big = replace(big, spec=replace(big.spec, llm=replace(big.spec.llm, vocab=400_000)))  # more than one bucket
    reduce_s, tail_s, after_s = played(True)
    assert (reduce_s == tail_s).all()
    assert reduce_s.max() > 0
    _, beside_tail_s, beside_s = played(False)
    assert beside_tail_s.max() < tail_s.max()
    assert beside_s < after_s
    assert played(None)[2] == (beside_s if plan.placement == "replicated" else after_s)


def test_ranks_of_stages() -> None:
    assert plan_stage_ranks(LAYOUTS["split encoder"]) == (0, 1, 2, 3)
    assert plan_stage_ranks(LAYOUTS["interleaved"]) == (0, 1, 2, 1, 2)
    assert plan_stage_ranks(LAYOUTS["replicated"]) == (0, 0)


def test_a_plan_of_another_model() -> None:
    with pytest.raises(PlanError, match="the plan places 9 llm layers, the model of the costs has 8"):
        plan_step(example.plan(llm=ModulePlan(layers=(5, 4), dp=3)), example.cost(), example.shapes(48))
    with pytest.raises(PlanError, match="a global batch of 5 samples cannot fill"):
        plan_step(example.plan(), example.cost(), example.shapes(5))


@pytest.mark.parametrize("name", ["intra_bytes_per_s", "inter_bytes_per_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bandwidth_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(PlanError, match=name):
        Network(**({"intra_bytes_per_s": 1e9, "inter_bytes_per_s": 1e9} | {name: value}))


def test_a_stage_without_work_takes_no_time() -> None:
    """Overheads, measured and fitted, are of actions that run: an encoder without images does not."""
    data = example.shapes(8)
    text = replace(data, **dict.fromkeys(("num_images", "image_tiles", "image_patches", "image_patches_sq",
                                          "image_tokens"), np.where(np.arange(8) < 4, 0, 64)))  # fmt: skip
    plan = example.plan(vision=ModulePlan(layers=(6,)), llm=ModulePlan(layers=(4, 4)), num_microbatches=2)
    cost = replace(example.cost(), per_microbatch_s=0.5)
    stages = stage_seconds(plan, sample_seconds(plan, cost, text), text, [[[0, 1, 2, 3], [4, 5, 6, 7]]])
    assert stages.forward[0][0, 0] == stages.backward[0][0, 0] == 0 < stages.forward[0][0, 1]
    correction = Calibration(offsets_s={"vision forward": 0.25, "llm forward": 0.25}, microbatch_s=1.0)
    forward, _ = calibrated(plan, stages, correction)
    assert forward[0][0, 0] == 0
    assert forward[0][0, 1] > 0.25 + stages.forward[0][0, 1]
    assert (forward[1] > 0.25 + stages.forward[1]).all()
