"""From the JSON of the runs to the table and the page."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hf_dflop.cost import CostModel, FitError, ModelSpec
from hf_dflop.shapes import Shapes
from recipes.demo.__main__ import _keep_settings
from recipes.demo.report import print_table, write_report
from recipes.demo.results import load_runs, spread, summarize
from recipes.demo.settings import ARMS, DemoSettings

SPEED = {"stock": 1.0, "balanced": 1.5, "packed": 2.0, "group_by_length": 1.1, "batch_rebalance": 1.25}


def _shapes(count: int) -> Shapes:
    images = np.arange(count) % 3
    return Shapes(
        num_images=images, image_tiles=images, image_patches=images * 4, image_patches_sq=images * 16,
        image_tokens=images * 4, text_tokens=np.arange(count) + 5, label_tokens=np.arange(count) + 2,
    )  # fmt: skip


def _run(arm: str, round_: int) -> dict[str, Any]:
    groups = [[[0, 1], [2]], [[3], [4, 5]]] if arm not in ("balanced", "packed") else [[[5], [2, 0]], [[3, 1], [4]]]
    ranks = [
        [
            {
                "step": step + 1, "epoch": 0, "rank": rank, "begin_s": 10.0 * step, "data_s": 0.1 * step,
                "slot_end_s": [10.0 * step + 2, 10.0 * step + 4 + rank], "sync_end_s": 10.0 * step + 6,
                "end_s": 10.0 * step + 7, "samples": groups[rank], "slot_predicted_s": [2.0, 2.5],
            }
            for step in range(4)
        ]
        for rank in range(2)
    ]  # fmt: skip
    log = {
        "dflop/step_s": 7.0,
        "dflop/idle_fraction": 0.1,
        "dflop/predicted_idle": 0.01,
        "dflop/predicted_idle_stock": 0.2,
    }
    return {
        "arm": arm, "round": round_, "num_ranks": 2, "num_steps": 4, "num_samples": 24, "seconds": 10.0,
        "samples_per_s": SPEED[arm] * (1 + round_), "tokens_per_s": 10.0, "padding_share": 0.25,
        "idle_fraction": 0.1, "losses": [4.0, 3.5, 3.0, 2.5], "grad_norms": [1.0, 1.0, 1.0, 1.0], "logs": [log] * 4,
        "evaluation": {f"{when}_token_{name}": 0.5 for when in ("before", "after")
                       for name in ("accuracy", "perplexity")},
        "peak_memory_bytes": [2**30, 2**31], "ranks": ranks,
    }  # fmt: skip


@pytest.fixture
def output(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    runs.mkdir()
    for arm in ARMS:
        for round_ in range(2):
            (runs / f"{arm}-{round_}.json").write_text(json.dumps(_run(arm, round_)))
    part = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {
        "vision_config": part | {"patch_size": 14},
        "text_config": part | {"hidden_act": "silu", "vocab_size": 32},
    }
    cost = CostModel.analytic(ModelSpec.from_config(config | {"projector_hidden_act": "gelu"}))
    error = FitError(median=0.1, p95=0.2, num_fitted=12, num_held_out=3)
    replace(cost, fit_error=error).save(tmp_path / "cost_model.json")
    return tmp_path


def test_ratios_are_taken_within_a_round(output: Path) -> None:
    rows = {row.arm: row for row in summarize(load_runs(output / "runs"))}
    assert rows["balanced"].ratio_to_stock == [1.5, 1.5]
    assert rows["batch_rebalance"].ratio_of_balanced == pytest.approx([1.2, 1.2])
    assert rows["stock"].predicted_idle == pytest.approx(0.2)
    assert rows["balanced"].predicted_idle == pytest.approx(0.01)
    assert rows["stock"].peak_memory_gib == 2.0
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"


def test_the_page_needs_no_network_and_tells_the_same(output: Path) -> None:
    shapes = _shapes(30)
    facts = {
        "source": "made up",
        "hardware": "none",
        "versions": "none",
        "annotate_ms_per_sample": 1.0,
        "annotate_speedup": 50.0,
    }
    path, summaries = write_report(output, shapes, shapes.select(range(24)), facts)
    page = path.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert page.count("Plotly.newPlot(") >= 5
    assert "Every optimizer step held the same samples" in page
    assert "1.50 (1.50–1.50)" in page
    kept = json.loads((output / "summary.json").read_text())
    assert kept["loss"] == {
        "max_loss_difference": 0.0, "max_relative_grad_norm_difference": 0.0, "same_samples_in_every_step": True,
    }  # fmt: skip
    console = Console(width=130, record=True)
    print_table(summaries, console)
    assert "hf_dflop" in console.export_text()


def test_a_step_with_other_samples_is_called_a_defect(output: Path) -> None:
    run = _run("balanced", 0)
    run["ranks"][0][2]["samples"] = [[5], [2, 2]]
    (output / "runs" / "balanced-0.json").write_text(json.dumps(run))
    shapes = _shapes(30)
    facts = {"source": "", "hardware": "", "versions": "", "annotate_ms_per_sample": 1.0, "annotate_speedup": 50.0}
    path, _ = write_report(output, shapes, shapes.select(range(24)), facts)
    assert "this is a defect" in path.read_text()


def test_a_missing_arm_is_named(output: Path) -> None:
    for path in (output / "runs").glob("batch_rebalance-*.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="batch_rebalance"):
        load_runs(output / "runs")


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    _keep_settings(DemoSettings(output_dir=tmp_path, cache=tmp_path))
    _keep_settings(DemoSettings(output_dir=tmp_path, cache=tmp_path))
    with pytest.raises(SystemExit, match="other settings"):
        _keep_settings(DemoSettings(output_dir=tmp_path, cache=tmp_path, num_steps=2))
