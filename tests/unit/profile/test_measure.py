"""Measuring tiny real models: what is found by structure, what the bytes come to, what is refused, the command."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_dflop.cli.app import app
from hf_dflop.cost import (
    CostModel,
    MemorySettings,
    MicrobatchCounts,
    ModelProfile,
    ModelSpec,
    StageLayers,
    Trainable,
    stage_memory,
)
from hf_dflop.errors import ModelError
from hf_dflop.profile.measure import measure_model
from hf_dflop.profile.measure_build import build, layer_kinds, shortened
from hf_dflop.profile.measure_grid import Size, first_sizes, held_out_sizes, next_size, refine
from hf_dflop.profile.measure_group import DecoderGroup, Setting, VisionGroup
from hf_dflop.profile.measure_parts import catch_image_calls, is_variable, tile_lengths
from hf_dflop.profile.measure_time import AllocationCounter, measure_bytes, time_runs

_SPEC = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "cost" / "tiny_models.py")
assert _SPEC is not None
assert _SPEC.loader is not None
tiny_models = importlib.util.module_from_spec(_SPEC)
sys.modules["tiny_models"] = tiny_models
_SPEC.loader.exec_module(tiny_models)

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"max_tokens": 128, "max_points": 4, "num_held_out": 1, "budget_s": 0.2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured() -> tuple[Any, ModelProfile]:
    model, _, _ = tiny_models.llava_clip_llama()
    return model, measure_model(model.config, **QUICK)


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_encoder_and_connector_are_found_in_every_family(name: str) -> None:
    model, _, _ = tiny_models.MODELS[name]()
    spec = ModelSpec.from_config(model.config)
    short = build(shortened(model.config, "vision", depth=3, layer=0), dtype="float32", attention="sdpa", device=CPU)
    variable = is_variable(short)
    grid = tile_lengths(spec, model.config, [100], variable=variable)[0]
    for count in (1, 3):
        parts = catch_image_calls(short, spec, grid, count, depth=3, variable=variable)
        assert parts.tokens == count * (grid[0] * grid[1] + spec.class_tokens)
        assert parts.connector is not None
        matrices = sum(p.numel() for p in parts.connector.module.parameters() if p.ndim >= 2)
        expected = sum(a * b for a, b in spec.connector.linears)
        assert matrices == pytest.approx(expected, rel=0.15) or name in ("glm4v", "ovis2", "mistral3_pixtral")
        assert parts.connector.detached(requires_grad=False)() is not None


def test_kinds_of_layers_come_from_the_config() -> None:
    windowed = tiny_models.qwen2_5_vl()[0].config
    assert [(kind.layer, kind.num_layers) for kind in layer_kinds(windowed, "vision")] == [(0, 3), (3, 1)]
    assert shortened(windowed, "vision", depth=2, layer=3).vision_config.fullatt_block_indexes == [0, 1]
    assert shortened(windowed, "vision", depth=2, layer=0).vision_config.fullatt_block_indexes == []
    experts = tiny_models.qwen3_vl_moe()[0].config
    assert [(kind.layer, kind.num_layers) for kind in layer_kinds(experts, "llm")] == [(0, 2), (1, 1)]
    assert len(layer_kinds(tiny_models.llava_clip_llama()[0].config, "llm")) == 1


def test_every_group_is_measured_and_described(measured: tuple[Any, ModelProfile]) -> None:
    model, profile = measured
    assert {point.group for point in profile.measurements} == {"vision", "connector", "llm", "llm_head"}
    assert profile.error is not None
    assert profile.error.num_held_out == 4
    assert {point.depth for point in profile.measurements if point.held_out and point.group == "llm"} == {2}
    assert profile.versions["torch"] == torch.__version__
    assert (profile.dtype, profile.attention, profile.num_threads) == ("float32", "sdpa", 1)
    assert profile.device
    assert ModelProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    assert all(point.backward_s > 0 for point in profile.measurements)
    cost = CostModel.from_profile(profile)
    assert (cost.llm_s([10, 100]) > 0).all()
    counted = {part: profile.parameters(part, tp=1) or 0 for part in profile.num_parameters}
    whole = sum(counted.values()) + counted["vision_layer"] * 3 + counted["llm_layer"] * 2
    assert whole == sum(p.numel() for p in model.parameters())


def test_kept_bytes_of_a_whole_step(measured: tuple[Any, ModelProfile]) -> None:
    """Profile and formulas against the bytes that a whole model of full depth keeps and needs."""
    _, profile = measured
    model, inputs, shapes = tiny_models.llava_clip_llama()
    model.set_attn_implementation("sdpa")
    assert (shapes.image_tiles[0], shapes.llm_tokens[0]) == (1, 94)

    def run() -> list[torch.Tensor]:
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        return [output.loss, output.logits.detach()]

    measure_bytes(run, CPU)  # gradients come to be
    kept, extra = measure_bytes(run, CPU)
    spec = ModelSpec.from_config(model.config)
    counts = MicrobatchCounts.of(spec, shapes, [[0]], padded=True)
    settings = MemorySettings(dtype="float32")
    known = stage_memory(spec, StageLayers.whole(spec), settings, profile=profile)
    guessed = stage_memory(spec, StageLayers.whole(spec), settings)
    assert known.measured
    assert known.kept_bytes(counts)[0] == pytest.approx(kept, rel=0.02)
    assert guessed.kept_bytes(counts)[0] == pytest.approx(kept, rel=0.1)
    assert known.peak_bytes(counts) - known.static_bytes == pytest.approx(kept + extra, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states(checkpointing: bool) -> None:
    config = tiny_models.llava_clip_llama()[0].config
    spec = ModelSpec.from_config(config)
    found = {}
    for state in ("trained", "passed", "frozen"):
        model = build(shortened(config, "llm", depth=4, layer=0), dtype="float32", attention="sdpa", device=CPU)
        setting = Setting(state=state, checkpointing=checkpointing, budget_s=0.05)  # type: ignore[arg-type]
        found[state] = DecoderGroup(model, spec, setting).at(Size(2, 32), (1, 3), held_out=False)[1][1]
    assert found["frozen"].backward_s == 0
    assert found["passed"].backward_s > 0
    if checkpointing:  # three layers keep their input each; what remains is fixed (rotary positions, norm, output)
        per_layer = 64 * 64 * 4
        assert found["trained"].kept_bytes < 3 * per_layer + 6 * per_layer
    else:
        assert found["trained"].kept_bytes > found["passed"].kept_bytes > found["frozen"].kept_bytes


def test_a_shard_holds_its_share_of_the_matrices() -> None:
    config = tiny_models.llava_clip_llama()[0].config
    spec = ModelSpec.from_config(config)
    norms = 2 * spec.llm.hidden
    counts = {}
    for tp in (1, 2):
        model = build(shortened(config, "llm", depth=4, layer=0), dtype="float32", attention="sdpa", device=CPU)
        group = DecoderGroup(model, spec, Setting(tp=tp, budget_s=0.05))
        counts[tp] = group.num_parameters()["llm_layer"] - norms
        group.at(Size(1, 16), (1, 3), held_out=False)
        model = build(shortened(config, "vision", depth=4, layer=0), dtype="float32", attention="sdpa", device=CPU)
        vision = VisionGroup(model, spec, Setting(tp=tp, budget_s=0.05), None)
        counts[10 * tp] = vision.num_parameters()["vision_layer"]
        vision.at(Size(2, 65), (1, 3), held_out=False)
    assert counts[2] == counts[1] / 2
    assert 0.5 * counts[10] < counts[20] < 0.52 * counts[10]  # norms and the last biases are on every rank


def test_refusals(tmp_path: Path) -> None:
    config = tiny_models.llava_clip_llama()[0].config
    with pytest.raises(ModelError, match="tp=3 does not divide"):
        measure_model(config, tp=3)
    with pytest.raises(ModelError, match="mixture of experts"):
        measure_model(tiny_models.qwen3_vl_moe()[0].config, tp=2)
    with pytest.raises(ModelError, match="frozen names"):
        measure_model(config, frozen=["tower"])
    with pytest.raises(ModelError, match="dtype"):
        measure_model(config, dtype="float7")
    with pytest.raises(ModelError, match="cannot be built"):
        measure_model(config, attn_implementation="no_such_attention")
    with pytest.raises(ModelError, match="64 tokens"):
        measure_model(config, max_tokens=8)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="gives no config"):
        measure_model(tmp_path / "config.json")
    with pytest.raises(ModelError, match="no vision_config"):
        measure_model({"model_type": "llama"})


def test_the_allocation_counter_counts_what_lives() -> None:
    leaf = torch.ones(1000, requires_grad=True)
    with AllocationCounter() as counter:
        kept = leaf.exp()
        assert counter.live_bytes == 4000
        view = kept[:10]
        assert counter.live_bytes == 4000
        gone = kept * 2
        del gone
        assert (counter.live_bytes, counter.peak_bytes) == (4000, 8000)
        leaf.detach().add_(1)
        assert counter.live_bytes == 4000  # what was there before is not counted
        del kept, view
        assert counter.live_bytes == 0


def test_timing_goes_turn_by_turn() -> None:
    order = []

    def runner(name: str) -> Any:
        leaf = torch.ones(4, requires_grad=True)

        def run() -> list[torch.Tensor]:
            order.append(name)
            return [leaf * 2]

        return run

    timings = time_runs([runner("a"), runner("b")], CPU, min_repeats=3, max_repeats=3, target=0.0)
    assert order == ["a", "b"] * 4
    assert all(timing.num_repeats == 3 and timing.backward_s > 0 for timing in timings)


def test_sizes_are_added_where_the_curve_is_worst() -> None:
    first = first_sizes(min_length=64, max_tokens=4096, variable=True)
    alone = [size for size in first if size.num_sequences == 1]
    assert {size.length for size in alone} >= {64, 4096}
    errors = [1.0 if size == alone[-1] else 0.0 for size in first]
    added = next_size(first, errors)
    assert added is not None
    assert alone[-2].length < added.length < 4096
    tiles = first_sizes(min_length=65, max_tokens=650, variable=False)
    assert {size.length for size in tiles} == {65}
    assert max(tiles).num_sequences == 10
    assert next_size([Size(1, 65), Size(2, 65)], [1.0, 1.0]) is None
    rng = np.random.default_rng(0)
    held = held_out_sizes(min_length=64, max_tokens=4096, variable=True, count=50, rng=rng)
    assert all(64 <= size.tokens <= 4096 * 1.5 for size in held)


@pytest.mark.parametrize(("known_after", "expected"), [(0, 2), (3, 5), (99, 6)])
def test_it_stops_when_two_in_a_row_were_predicted(known_after: int, expected: int) -> None:
    first = first_sizes(min_length=16, max_tokens=8192, variable=False)
    told = iter([1.0] * known_after + [0.0] * 99)
    added = refine(
        first,
        lambda size: size,
        lambda size: next(told),
        lambda sizes: [1.0] * len(sizes),
        target=0.03,
        max_points=len(first) + 6,
        is_over=lambda: False,
    )
    assert len(added) == expected


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_models.llava_clip_llama()[0].config
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    called: dict[str, Any] = {}

    def quick(model: Any, **options: Any) -> ModelProfile:
        called.update(options)
        return measure_model(model, **{**options, **QUICK})

    monkeypatch.setattr("hf_dflop.profile.measure.measure_model", quick)
    output = tmp_path / "out.json"
    arguments = ["measure", "-m", str(tmp_path / "config.json"), "-o", str(output), "--frozen", "vision", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["error"]["all"]["num_held_out"] == 4
    assert called["frozen"] == ["vision"]
    profile = ModelProfile.load(output)
    assert {point.state for point in profile.measurements if point.group == "vision"} == {"frozen"}
    cost = CostModel.from_profile(profile, trainable=Trainable(vision=False))
    assert cost.trainable == Trainable(vision=False)
    refused = CliRunner().invoke(app, ["measure", "-m", str(tmp_path / "config.json"), "-o", str(tmp_path)])
    assert isinstance(refused.exception, ModelError)
    assert "is a folder" in str(refused.exception)


def test_measuring_needs_no_datasets(tmp_path: Path) -> None:
    """A machine with GPUs and nothing but torch, transformers and accelerate is enough."""
    model, _, _ = tiny_models.llava_clip_llama()
    model.config.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['evaluate'] = None\n"
        "import hf_dflop; from transformers import AutoConfig\n"
        f"profile = hf_dflop.measure_model(AutoConfig.from_pretrained({str(tmp_path)!r}), "
        "max_tokens=128, max_points=4, num_held_out=1, budget_s=0.1)\n"
        "print(len(profile.measurements))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 0
