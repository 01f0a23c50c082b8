"""FLOP formulas against numbers counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from hf_dflop.cost import (
    ModelSpec,
    Trainable,
    llm_flops,
    llm_terms,
    module_flops,
    train_factors,
    training_flops,
)
from hf_dflop.cost.flops import vision_terms
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes


def test_encoder_and_connector_by_hand(spec: ModelSpec, shapes: Shapes) -> None:
    terms = vision_terms(spec, shapes)
    # a patch has 3 channels x 2 x 2 = 12 values; 4 patches to width 4
    assert terms["patch_embed"].tolist() == [2 * 12 * 4 * 4, 0]  # 384
    # 4 patches + 1 class token; q, k, v, o are 4 x 4; two MLP matrices 4 x 8
    assert terms["vision_linear"].tolist() == [5 * (4 * 2 * 4 * 4 + 2 * 2 * 4 * 8), 0]  # 5 * 256
    # 5 x 5 pairs; score and weighted sum, 2 heads x 2
    assert terms["vision_attention"].tolist() == [25 * (2 * 4 + 2 * 4), 0]  # 400
    # the class token is dropped before the connector
    assert module_flops(spec, shapes).connector.tolist() == [4 * (2 * 4 * 6 + 2 * 6 * 6), 0]  # 480
    assert module_flops(spec, shapes).vision.tolist() == [384 + 1280 + 400, 0]


def test_llm_by_hand(spec: ModelSpec, shapes: Shapes) -> None:
    flops = module_flops(spec, shapes, causal_factor=1.0)
    # q and o: 6 x 6; k and v: 6 x 2 (one KV head of 2); MLP: three of 6 x 10; two layers
    per_token = 2 * (2 * (36 + 36 + 12 + 12) + 2 * 3 * 60)
    assert per_token == 1104
    # 3 heads x 2, score and weighted sum: 24 a pair and layer
    assert flops.llm.tolist() == [10 * 1104 + 2 * 24 * 100, 3 * 1104 + 2 * 24 * 9]
    assert flops.llm_head.tolist() == [10 * 2 * 6 * 20, 3 * 2 * 6 * 20]
    half = module_flops(spec, shapes, causal_factor=0.5)
    assert half.llm.tolist() == [11040 + 2400, 3312 + 216]
    assert llm_flops(spec, [10, 3], causal_factor=1.0).tolist() == (flops.llm + flops.llm_head).tolist()
    assert flops.total[1] == flops.llm[1] + flops.llm_head[1]


def test_mixture_of_experts_by_hand(spec: ModelSpec) -> None:
    llm = replace(
        spec.llm,
        num_experts=4,
        active_experts=2,
        expert_intermediate=5,
        shared_intermediate=3,
        num_moe_layers=1,
    )
    # two layers of projections (192), one dense MLP (360), one sparse: three of 6 x (2*5 + 3), a 6 x 4 router
    per_token = 2 * 192 + 360 + (2 * 3 * 6 * 13 + 2 * 6 * 4)
    assert llm_terms(replace(spec, llm=llm), [7])["llm_linear"].tolist() == [7 * per_token]


def test_windows_by_hand(spec: ModelSpec, shapes: Shapes) -> None:
    vision = replace(spec.vision, num_layers=2, window_tokens=2, num_windowed_layers=1)
    windowed = replace(spec, vision=vision, class_tokens=0)
    # one global layer with 16 pairs, one with windows of 2: 4 x 2 pairs; 16 FLOPs a pair
    assert vision_terms(windowed, shapes)["vision_attention"].tolist() == [16 * (16 + 8), 0]
    llm = replace(spec.llm, window_tokens=4, num_windowed_layers=1)
    sliding = replace(spec, llm=llm)
    # length 10: 0.5 * 100 pairs in the global layer, 4 * 10 - 4 * 4 / 2 = 32 in the sliding one; 24 a pair
    assert llm_terms(sliding, [10, 4])["llm_attention"].tolist() == [24 * (50 + 32), 24 * (8 + 8)]
    # a dense kernel masks, and saves nothing
    assert llm_terms(sliding, [10], causal_factor=1.0)["llm_attention"].tolist() == [24 * 200]


def test_pooling_head_copies_and_kept_class_tokens(spec: ModelSpec, shapes: Shapes) -> None:
    changed = replace(spec, pooling_head=True, connector=replace(spec.connector, copies=3, keeps_class_tokens=True))
    terms = vision_terms(changed, shapes)
    # per position: k and v (2 * 2 * 16), one score and sum (4 * 4); per tile: q and o, two MLP matrices 4 x 8
    assert terms["vision_pooling"].tolist() == [5 * (64 + 16) + (64 + 128), 0]
    assert module_flops(changed, shapes).connector.tolist() == [3 * 5 * 120, 0]


def test_llm_cost_is_monotone_and_vectorised(spec: ModelSpec) -> None:
    sliding = replace(spec, llm=replace(spec.llm, window_tokens=50, num_windowed_layers=1))
    for factor in (0.5, 0.7, 1.0):
        assert (np.diff(llm_flops(sliding, np.arange(300), causal_factor=factor)) > 0).all()
    assert llm_flops(spec, [0]).tolist() == [0.0]


def test_train_factors(spec: ModelSpec) -> None:
    def factors(checkpointing: bool = False, **trainable: bool) -> dict[str, float]:
        return train_factors(spec, Trainable(**trainable), checkpointing=checkpointing)

    everything = factors()
    assert (everything["vision_linear"], everything["llm_linear"], everything["patch_embed"]) == (3, 3, 2)
    frozen_vision = factors(vision=False)
    assert frozen_vision["vision_linear"] == frozen_vision["vision_attention"] == 1
    assert (frozen_vision["connector_first"], frozen_vision["connector_rest"]) == (2, 3)
    assert (frozen_vision["llm_linear"], frozen_vision["llm_head"]) == (3, 3)
    only_connector = factors(vision=False, llm=False)
    assert (only_connector["llm_linear"], only_connector["llm_attention"]) == (2, 3)
    only_llm = factors(vision=False, connector=False)
    assert (only_llm["connector_first"], only_llm["connector_rest"], only_llm["llm_linear"]) == (1, 1, 3)
    adapters = factors(vision=False, connector=False, llm=False, llm_adapters=True)
    assert (adapters["connector_rest"], adapters["llm_linear"], adapters["llm_attention"]) == (1, 2, 3)
    assert set(factors(vision=False, connector=False, llm=False).values()) == {1.0}
    normed = replace(spec, connector=replace(spec.connector, input_norm=True))
    assert train_factors(normed, Trainable(vision=False))["connector_first"] == 3
    unread = replace(spec, vision=replace(spec.vision, num_layers=4), unread_vision_layers=1)
    assert train_factors(unread)["vision_linear"] == 1 + 2 * 0.75


def test_checkpointing_factors(spec: ModelSpec) -> None:
    # all is repeated but the last MLP matrix: 2 * 6 * 10 of a layer's 552 FLOPs per token (encoder: 64 of 256)
    everything = train_factors(spec, checkpointing=True)
    assert everything["llm_linear"] == pytest.approx(3 + 1 - 120 / 552)
    assert everything["vision_linear"] == pytest.approx(3 + 1 - 64 / 256)
    assert (everything["llm_attention"], everything["llm_head"], everything["patch_embed"]) == (4, 3, 2)
    # transformers lets gradients start at the embeddings then: they pass the frozen encoder
    frozen = Trainable(vision=False, connector=False)
    passed = train_factors(spec, frozen, checkpointing=True)
    assert passed["vision_linear"] == pytest.approx(2 + 1 - 64 / 256)
    assert (passed["vision_attention"], passed["connector_first"], passed["patch_embed"]) == (4, 2, 1)
    stopped = train_factors(spec, replace(frozen, inputs_require_grad=False), checkpointing=True)
    assert (stopped["vision_linear"], stopped["vision_attention"], stopped["connector_rest"]) == (1, 1, 1)
    assert stopped["llm_attention"] == 4


def test_training_flops_by_hand(spec: ModelSpec, shapes: Shapes) -> None:
    flops = training_flops(spec, shapes, Trainable(vision=False))
    assert flops.vision.tolist() == [2064, 0]
    assert flops.connector.tolist() == [4 * (2 * 48 + 3 * 72), 0]
    assert flops.llm.tolist() == [3 * (11040 + 2400), 3 * (3312 + 216)]
    assert flops.llm_head.tolist() == [3 * 2400, 3 * 720]
    again = training_flops(spec, shapes, Trainable(vision=False, inputs_require_grad=False), True)
    assert again.llm[1] == pytest.approx(4 * (3312 + 216) - 3 * 2 * 120)


def test_errors(spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match=r"causal_factor is 1.5; it must lie in \(0, 1\]"):
        llm_flops(spec, [3], causal_factor=1.5)
    with pytest.raises(ModelError, match="-1 tokens"):
        llm_flops(spec, [-1])
