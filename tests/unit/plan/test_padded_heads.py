"""A 25-head encoder on four ranks costs what one with 28 heads would."""

from dataclasses import replace

import pytest

from hf_dflop.cost.flops import linear_flops_per_position
from hf_dflop.plan.candidates import make_candidate
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.padded_heads import encoder_share, padded_encoder
from hf_dflop.plan.space import Layout, layouts, tensor_degrees
from hf_dflop.plan.stage_seconds import sample_seconds
from hf_dflop.plan.step import plan_step
from tests.unit.plan.planning import mixture, scorer_of, small_gpu, small_spec

SPEC = small_spec()
ODD = replace(SPEC, vision=replace(SPEC.vision, heads=5, kv_heads=5, head_dim=52))
CLUSTER = Cluster(nodes=1, gpus_per_node=4, gpu=small_gpu(), latency_s=0.0)


def test_degrees() -> None:
    assert tensor_degrees(ODD.vision, 4) == [1]
    assert tensor_degrees(ODD.vision, 4, pad_heads=True) == [1, 2, 4]
    assert tensor_degrees(replace(ODD.vision, kv_heads=1), 4, pad_heads=True) == [1]  # shared keys cannot be padded
    assert tensor_degrees(ODD.vision, 8, pad_heads=True) == [1, 2, 4]  # more ranks than heads
    assert any(layout.v_tp == 4 for layout in layouts(ODD, CLUSTER, 16))


def test_seconds_and_bytes_are_those_of_the_padded_encoder() -> None:
    assert padded_encoder(ODD, 4).vision.heads == 8
    assert padded_encoder(SPEC, 4) == SPEC
    assert encoder_share(SPEC, 4) == 0.25
    # per position and layer: projections 2·256·4·260, MLP 4·256·1024; with 8 heads 2·256·4·416
    assert encoder_share(ODD, 4) == pytest.approx((851_968 + 1_048_576) / (532_480 + 1_048_576) / 4)
    assert linear_flops_per_position(ODD.vision) == 4 * (532_480 + 1_048_576)
    scorer = scorer_of(CLUSTER, ODD, mixture(0), 16)
    plan = make_candidate(scorer.workload, Layout("replicated", 4, 1, 1, 4, 1, 1, 1), "1f1b", 1, 4, (False, False))
    assert plan is not None
    plain = sample_seconds(replace(plan, vision=replace(plan.vision, tp=1)), scorer.workload.cost, mixture(0))
    split = sample_seconds(plan, scorer.workload.cost, mixture(0))
    assert split.vision == pytest.approx(plain.vision * 4 * encoder_share(ODD, 4))
    whole = scorer_of(CLUSTER, padded_encoder(ODD, 4), mixture(0), 16)
    assert scorer.bytes_of(plan, True) == pytest.approx(whole.bytes_of(plan, True))


def test_the_score_and_the_step_agree() -> None:
    scorer = scorer_of(CLUSTER, ODD, mixture(2), 16)
    plan = make_candidate(
        scorer.workload, Layout("disjoint", 2, 1, 1, 2, 1, 1, 1), "1f1b", 1, 4, (False, False), balance=False
    )
    assert plan is not None
    step = plan_step(plan, scorer.workload.cost, scorer.workload.batches[0])
    stages = scorer.stages(plan, 0)
    assert step.durations.seconds[0, 0, 0] == pytest.approx(stages.forward[0][0])
