"""Seconds from shapes: analytic, fitted, saved."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_dflop.cost import CostModel, ModelSpec, Observation, Rates, Trainable, training_flops
from hf_dflop.cost.fit import RATE_TERMS, nnls
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

SPEC = ModelSpec.from_config(
    {
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": 1536,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
        "text_config": {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "hidden_act": "silu",
            "vocab_size": 151936,
        },
    }
)  # the sizes of Qwen2-VL-2B
TRUTH = replace(
    CostModel.analytic(SPEC, per_microbatch_s=0.05),
    rates=Rates(vision_linear=3e14, vision_attention=1.5e14, llm_linear=4e14, llm_attention=2e14),
)


def random_shapes(rng: np.random.Generator, *, fixed_tiles: bool = False, images: bool = True) -> Shapes:
    count = int(rng.integers(1, 9))
    tiles = rng.integers(0, 9 if fixed_tiles else 3, count) * int(images)
    patches = np.full(count, 728) if fixed_tiles else rng.integers(50, 4000, count) * 4
    return Shapes(
        num_images=tiles,
        image_tiles=tiles,
        image_patches=tiles * patches,
        image_patches_sq=tiles * patches**2,
        image_tokens=tiles * patches // 4,
        text_tokens=np.exp(rng.uniform(4, 9.5, count)).astype(int),
        label_tokens=np.ones(count, dtype=int),
    )


def observe(seed: int, count: int, noise: float, **kind: bool) -> list[Observation]:
    rng = np.random.default_rng(seed)
    observations = []
    for index in range(count):
        shapes, padded = random_shapes(rng, **kind), bool(index % 2)
        seconds = TRUTH.microbatch_seconds(shapes, [range(len(shapes))], padded=padded)[0]
        seconds *= 1 + noise * rng.standard_normal()
        observations.append(Observation(shapes=shapes, padded=padded, seconds=float(seconds)))
    return observations


def test_analytic_is_flops_over_rate(spec: ModelSpec, shapes: Shapes) -> None:
    train = Trainable(vision=False)
    cost = CostModel.analytic(
        spec, vision_flops_per_s=10.0, llm_flops_per_s=100.0, trainable=train, checkpointing=True
    )
    flops = training_flops(spec, shapes, train, checkpointing=True)
    np.testing.assert_allclose(cost.vision_s(shapes), (flops.vision + flops.connector) / 10)
    np.testing.assert_allclose(cost.llm_s(shapes), (flops.llm + flops.llm_head) / 100)
    np.testing.assert_allclose(cost.llm_s(shapes.llm_tokens), cost.llm_s(shapes))
    seconds = cost.sample_seconds(shapes)
    assert (seconds.shape, seconds.dtype) == ((2, 2), np.float64)
    assert seconds[1, 0] == 0
    assert (np.diff(cost.llm_s(np.arange(100))) > 0).all()


def test_microbatches_padded_and_packed(spec: ModelSpec, shapes: Shapes) -> None:
    cost = CostModel.analytic(spec, per_microbatch_s=2.0, llm_flops_per_s=1e3, vision_flops_per_s=1e3)
    vision, (long, short) = cost.vision_s(shapes), cost.llm_s(shapes)  # 10 and 3 tokens
    groups = [[0, 1], [1], []]
    padded = cost.microbatch_seconds(shapes, groups, padded=True)
    packed = cost.microbatch_seconds(shapes, groups, padded=False)
    np.testing.assert_allclose(padded, [vision[0] + 2 * long + 2, short + 2, 2])
    np.testing.assert_allclose(packed, [vision[0] + long + short + 2, short + 2, 2])
    modules = cost.microbatch_module_seconds(shapes, groups, padded=True)
    np.testing.assert_allclose(modules, [[vision[0], 2 * long], [0, short], [0, 0]])
    assert cost.microbatch_seconds(shapes, [], padded=True).shape == (0,)


def test_save_load_and_version(spec: ModelSpec, tmp_path: Path) -> None:
    cost = CostModel.fit(SPEC, observe(0, 16, 0.01), trainable=Trainable(vision=False), causal_factor=1.0)
    cost.save(tmp_path / "cost.json")
    loaded = CostModel.load(tmp_path / "cost.json")
    assert loaded == cost
    assert loaded.version == cost.version
    assert replace(cost, per_microbatch_s=1.0).version != cost.version
    assert replace(cost, fit_error=None).version == cost.version
    with pytest.raises(ModelError, match="schema version None"):
        CostModel.from_dict({})
    with pytest.raises(ModelError, match="not readable"):
        CostModel.from_dict({"schema_version": 1})


def test_nnls_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix, target = rng.normal(size=(8, 4)), rng.normal(size=8)
        found = nnls(matrix, target)
        assert (found >= 0).all()
        best = np.inf
        for mask in range(16):  # every set of free columns
            free = [i for i in range(4) if mask >> i & 1]
            guess = np.zeros(4)
            guess[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0] if free else []
            if (guess >= 0).all():
                best = min(best, float(((matrix @ guess - target) ** 2).sum()))
        assert ((matrix @ found - target) ** 2).sum() == pytest.approx(best)


def test_fit_recovers_planted_rates() -> None:
    exact = CostModel.fit(SPEC, observe(1, 16, 0.0))
    for name in RATE_TERMS:
        assert getattr(exact.rates, name) == pytest.approx(getattr(TRUTH.rates, name), rel=1e-3)
    noisy = CostModel.fit(SPEC, observe(1, 60, 0.002))
    for name in RATE_TERMS:
        assert getattr(noisy.rates, name) == pytest.approx(getattr(TRUTH.rates, name), rel=0.02)
    assert noisy.per_microbatch_s == pytest.approx(0.05, rel=0.02)
    assert noisy.fit_error is not None
    assert noisy.fit_error.median < 0.004
    assert (noisy.fit_error.num_fitted, noisy.fit_error.num_held_out) == (48, 12)
    assert noisy.fit_error.merged == ()


@pytest.mark.parametrize("seed", range(5))
def test_few_noisy_observations_still_predict(seed: int) -> None:
    fitted = CostModel.fit(SPEC, observe(seed, 16, 0.02))
    shapes = random_shapes(np.random.default_rng(1000 + seed))
    groups = [range(len(shapes))]
    expected = TRUTH.microbatch_seconds(shapes, groups, padded=True)
    np.testing.assert_allclose(fitted.microbatch_seconds(shapes, groups, padded=True), expected, rtol=0.1)


def test_fit_merges_what_it_cannot_tell_apart() -> None:
    tiles = CostModel.fit(SPEC, observe(0, 16, 0.01, fixed_tiles=True))
    assert tiles.fit_error is not None
    assert tiles.fit_error.merged == ("vision_linear+vision_attention",)
    assert tiles.rates.vision_linear == tiles.rates.vision_attention
    text = CostModel.fit(SPEC, observe(0, 16, 0.01, images=False))
    assert text.rates.vision_linear == text.rates.llm_linear
    few = CostModel.fit(SPEC, observe(0, 6, 0.01))
    assert few.fit_error is not None
    assert few.fit_error.merged


def test_held_out_observations_are_not_fitted() -> None:
    observations = observe(3, 15, 0.01)
    reference = CostModel.fit(SPEC, observations)
    spoiled = [
        replace(observed, seconds=observed.seconds * (3 if i % 5 == 4 else 1))
        for i, observed in enumerate(observations)
    ]
    fitted = CostModel.fit(SPEC, spoiled)
    assert fitted.rates == reference.rates
    assert fitted.fit_error is not None
    assert fitted.fit_error.median == pytest.approx(2 / 3, abs=0.1)


def test_errors(spec: ModelSpec, shapes: Shapes) -> None:
    with pytest.raises(ModelError, match="4 observations with hold_out_every=5 leave 4 to fit and 0 to check"):
        CostModel.fit(SPEC, observe(0, 4, 0.0))
    with pytest.raises(ModelError, match=r"-1\.0 seconds"):
        Observation(shapes=shapes, padded=True, seconds=-1.0)
    with pytest.raises(ModelError, match="no samples"):
        Observation(shapes=shapes.select([]), padded=True, seconds=1.0)
    with pytest.raises(ModelError, match=r"must be positive and finite"):
        CostModel.analytic(spec, llm_flops_per_s=0.0)
    with pytest.raises(ModelError, match=r"causal_factor is 0"):
        CostModel.analytic(spec, causal_factor=0.0)
    with pytest.raises(ModelError, match="per_microbatch_s is -1"):
        CostModel.analytic(spec, per_microbatch_s=-1.0)
    empty = replace(observe(0, 1, 0.0)[0], shapes=replace(shapes, text_tokens=[0, 0], image_tokens=[0, 0]))
    nothing = replace(
        empty, shapes=replace(empty.shapes, image_tiles=[0, 0], image_patches=[0, 0], image_patches_sq=[0, 0])
    )
    with pytest.raises(ModelError, match="no FLOPs at all"):
        CostModel.fit(SPEC, [nothing] * 6)
