"""Bytes of a rank, counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from hf_dflop.cost import (
    MemorySettings,
    MicrobatchCounts,
    ModelSpec,
    StageLayers,
    Trainable,
    parameter_counts,
    stage_memory,
)
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

FP32 = MemorySettings(dtype="float32")
ALL_PARAMETERS = 56 + 136 + 60 + 126 + 2 * 288 + 120


def test_parameters_by_hand(spec: ModelSpec) -> None:
    assert parameter_counts(spec) == {
        "vision_fixed": 4 * (3 * 2 * 2 + 2),
        "vision_layer": 4 * 4 * 4 + 2 * 4 * 8 + 2 * 4,
        "connector": 4 * 6 + 6 * 6,
        "llm_fixed": 20 * 6 + 6,
        "llm_layer": 6 * (2 * 3 + 2 * 1) * 2 + 3 * 6 * 10 + 2 * 6,
        "llm_head": 20 * 6,
    }
    assert parameter_counts(spec, tp=2)["llm_layer"] == 6 * 8 * 2 // 2 + 3 * 6 * 10 // 2 + 2 * 6


def test_static_bytes_by_hand(spec: ModelSpec) -> None:
    whole = StageLayers.whole(spec)
    plain = stage_memory(spec, whole, FP32)
    assert plain.static_bytes == ALL_PARAMETERS * (4 + 4 + 8)
    mixed = stage_memory(spec, whole, MemorySettings())
    assert (mixed.parameters_bytes, mixed.gradients_bytes, mixed.optimizer_bytes) == tuple(
        ALL_PARAMETERS * size for size in (2, 2, 12)
    )
    assert stage_memory(spec, whole, MemorySettings(dtype="float32", optimizer="sgd")).optimizer_bytes == 0
    trainer = MemorySettings(weights_dtype="float32")
    assert stage_memory(spec, whole, trainer).static_bytes == plain.static_bytes


def test_what_is_frozen_has_no_gradient_and_no_state(spec: ModelSpec) -> None:
    settings = MemorySettings(dtype="float32", trainable=Trainable(vision=False, llm=False))
    memory = stage_memory(spec, StageLayers.whole(spec), settings)
    assert memory.parameters_bytes == 4 * ALL_PARAMETERS
    assert (memory.gradients_bytes, memory.optimizer_bytes) == (4 * 60, 8 * 60)
    kept = memory.kept_bytes(MicrobatchCounts(vision_tokens=10, vision_pairs=100))
    assert kept == stage_memory(spec, StageLayers(connector=True), settings).vision.kept_per_token_bytes * 10


@pytest.mark.parametrize(("stage", "divided"), [(0, (1, 1, 1)), (1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_sharding(spec: ModelSpec, stage: int, divided: tuple[int, int, int]) -> None:
    layers = StageLayers.whole(spec)
    alone = stage_memory(spec, layers, FP32)
    sharded = stage_memory(spec, layers, replace(FP32, zero_stage=stage, shards=4))
    assert sharded.parameters_bytes == alone.parameters_bytes / divided[0]
    assert sharded.gradients_bytes == alone.gradients_bytes / divided[1]
    assert sharded.optimizer_bytes == alone.optimizer_bytes / divided[2]
    assert sharded.gathered_bytes == (2 * 288 * 4 if stage == 3 else 0)


def test_tied_embeddings_are_held_once(spec: ModelSpec) -> None:
    tied = replace(spec, llm=replace(spec.llm, tied_embeddings=True))
    both = stage_memory(tied, StageLayers(llm_fixed=True, llm_head=True), FP32)
    assert both.parameters_bytes == 4 * 126
    assert stage_memory(tied, StageLayers(llm_head=True), FP32).parameters_bytes == 4 * 120


def test_logits_and_checkpointing(spec: ModelSpec) -> None:
    head = stage_memory(spec, StageLayers(llm_head=True), FP32)
    assert head.llm.kept_per_token_bytes == 20 * 4 * 2  # logits and log-probabilities
    full = stage_memory(spec, StageLayers(llm_layers=2), FP32)
    again = stage_memory(spec, StageLayers(llm_layers=2), replace(FP32, llm_checkpointing=True))
    assert again.llm.kept_per_token_bytes == 2 * 6 * 4  # the inputs of two layers
    assert again.llm.extra_per_token_bytes == full.llm.kept_per_token_bytes / 2 + full.llm.extra_per_token_bytes
    eager = stage_memory(spec, StageLayers(llm_layers=2), replace(FP32, dense_attention=True))
    assert eager.llm.kept_per_pair_bytes == 2 * 3 * 4  # three heads' probabilities, in two layers


def test_peak_is_all_in_flight_and_one_computing(spec: ModelSpec, shapes: Shapes) -> None:
    memory = stage_memory(spec, StageLayers.whole(spec), FP32)
    counts = MicrobatchCounts.of(spec, shapes, [[0], [0, 1], []], padded=True)
    assert counts.vision_tokens.tolist() == [5, 5, 0]  # a class token
    assert counts.vision_pairs.tolist() == [25, 25, 0]
    assert counts.llm_tokens.tolist() == [10, 20, 0]
    assert counts.llm_pairs.tolist() == [100, 200, 0]
    packed = MicrobatchCounts.of(spec, shapes, [[0, 1]], padded=False)
    assert (packed.llm_tokens.tolist(), packed.llm_pairs.tolist()) == ([13], [109])
    kept, extra = memory.kept_bytes(counts), memory.extra_bytes(counts)
    assert memory.peak_bytes(counts) == pytest.approx(memory.static_bytes + kept.sum() + extra.max())
    assert np.all(np.diff(kept) != 0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ModelError, match="optimizer"):
        MemorySettings(optimizer="lion")
    with pytest.raises(ModelError, match="dtype"):
        MemorySettings(dtype="int4")
    with pytest.raises(ModelError, match="zero_stage"):
        MemorySettings(zero_stage=4)
    with pytest.raises(ModelError, match="layers"):
        StageLayers(llm_layers=-1)
