"""The paper's settings: models and mix as published, a baseline that is exhaustive."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.cost.parameters import parameter_counts
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.workload import Workload, draw_batches
from recipes.paper.baseline import even, homogeneous_plans, tune
from recipes.paper.mix import draw_mix
from recipes.paper.report import write_table
from recipes.paper.run import ratio, run_setting
from recipes.paper.settings import SCALING, SETTINGS, Setting, a100_cluster

SMALL = replace(
    SETTINGS[0],
    name="small",
    config={
        "vision_config": {**SETTINGS[0].config["vision_config"], "hidden_size": 128, "intermediate_size": 512,
                          "num_hidden_layers": 4},
        "text_config": {**SETTINGS[0].config["text_config"], "hidden_size": 256, "intermediate_size": 1024,
                        "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1000},
        "projector_hidden_act": "gelu",
    },
)  # fmt: skip


def small_scorer(setting: Setting, num_gpus: int) -> Scorer:
    spec, cluster = ModelSpec.from_config(setting.config), a100_cluster(num_gpus)
    rate = cluster.reference.flops_per_s
    cost = CostModel.analytic(spec, vision_flops_per_s=rate, llm_flops_per_s=rate)
    return Scorer(Workload(cost, draw_batches(draw_mix("onevision", 500), 16, 2, 0)), cluster, MemoryRule())


def test_the_models_have_the_sizes_that_their_names_say() -> None:
    billions = {
        "ov-qwen2.5-7b": (0.4, 7.6),
        "ov-llama3-8b": (0.4, 8.0),
        "ov-qwen2.5-32b": (0.4, 32.8),
        "ov-llama3-70b": (0.4, 70.6),
        "ov-qwen2.5-72b": (0.4, 72.7),
        "internvl2.5-72b": (5.5, 72.7),
        "vit-6b-qwen2.5-7b": (5.5, 7.6),
    }
    for setting in SCALING:
        spec = ModelSpec.from_config(setting.config)
        assert not spec.assumptions, spec.assumptions
        counts = parameter_counts(spec)
        encoder = counts["vision_fixed"] + spec.vision.num_layers * counts["vision_layer"]
        llm = counts["llm_fixed"] + spec.llm.num_layers * counts["llm_layer"] + counts["llm_head"]
        expected = billions[setting.name]
        assert encoder / 1e9 == pytest.approx(expected[0], rel=0.05)
        assert llm / 1e9 == pytest.approx(expected[1], rel=0.02)


@pytest.mark.parametrize("name", ["onevision", "internvl"])
def test_the_mix_has_the_published_shares(name: str) -> None:
    shapes = draw_mix(name, 20_000, 1)
    video = (shapes.image_tokens == shapes.num_images * (210 if name == "onevision" else 256)) & (
        shapes.num_images > 12
    )
    assert 0.2 < video.mean() < 60 / 185
    assert (shapes.num_images == 1).mean() == pytest.approx(65 / 185, abs=0.02)
    assert shapes.llm_tokens.max() < 16_384
    assert np.corrcoef(shapes.image_tiles, shapes.text_tokens)[0, 1] == pytest.approx(0, abs=0.05)
    with pytest.raises(ValueError, match="onevision"):
        draw_mix("none", 1)


def test_layers_are_spread_by_number() -> None:
    assert even(28, 8) == (3, 4, 3, 4, 3, 4, 3, 4)
    assert even(4, 4) == (1, 1, 1, 1)


def test_the_baseline_is_the_fastest_of_all_its_plans() -> None:
    scorer = small_scorer(SMALL, 4)
    plans = [plan for plan in homogeneous_plans(scorer, (False, False)) if scorer.fits(plan, composed=True)]
    assert {plan.placement for plan in plans} == {"replicated", "colocated", "disjoint"}
    assert all(plan.num_ranks == 4 and plan.vision.dp == plan.llm.dp and not plan.balance for plan in plans)
    assert all(plan.vision.tp == plan.llm.tp for plan in plans)
    best, tried = tune(scorer, homogeneous_plans)
    assert best is not None
    assert tried >= len(plans)
    assert scorer.all_seconds(best).mean() == min(scorer.all_seconds(plan).mean() for plan in plans)


def test_a_run_ends_in_a_table(tmp_path: Path) -> None:
    run = run_setting(SMALL, 4, tell=lambda line: None)
    run = json.loads(json.dumps(run))
    assert ratio(run, "homogeneous") == (1.0, 1.0, 1.0)
    balanced = ratio(run, "balancer only")
    assert balanced is not None
    assert balanced[1] <= balanced[0] <= balanced[2]
    run["name"], run["num_gpus"] = SETTINGS[0].name, SETTINGS[0].num_gpus
    table = write_table({f"{SETTINGS[0].name}@{SETTINGS[0].num_gpus}": run}, tmp_path / "table.md")
    assert f"{balanced[0]:.2f}" in table
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith("| model |")
