"""Trainer over a pipeline: the stock run's losses, norms and parameters; resumed bit by bit; a killed rank."""

import time
from pathlib import Path

import pytest

from tests.distributed.every_case import EVERY_CASE
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
SCRIPT = "tests.distributed.scripts.pipeline_trainer"
ALL_TYPES = ["float32", "float64"] if EVERY_CASE else ["float64"]


@pytest.mark.parametrize(
    ("case", "types"),
    [
        ("llava:1,1,2", ["float32", "float64"]),
        ("lora:1,2,1", ALL_TYPES),
        ("qwen2_5_vl:3,1", ALL_TYPES),
        *([("qwen2_5_vl:2,1,1", ALL_TYPES), ("qwen3_vl_moe:1,2,1", ALL_TYPES)] if EVERY_CASE else []),
    ],
)
def test_ten_steps_and_a_stock_checkpoint(tmp_path: Path, case: str, types: list[str]) -> None:
    launch(SCRIPT, "stock", str(tmp_path), case.partition(":")[0], *types, num_processes=0)
    output = launch(SCRIPT, "train", str(tmp_path), case, *types, num_processes=3)
    assert output.count("trainer: ") == len(types)


def test_rows_with_videos(tmp_path: Path) -> None:
    output = launch("tests.distributed.scripts.pipeline_videos_trainer", str(tmp_path), num_processes=2)
    if output.count("videos trainer: refused") == 2:
        pytest.skip("models of this transformers take no features of videos, and the pipeline refused them")
    assert output.count("videos trainer: exact") == 2


def test_stopped_and_resumed(tmp_path: Path) -> None:
    output = launch(SCRIPT, "resume", str(tmp_path), "lora:1,2,1", num_processes=3)
    assert "trainer: 5 + 2 = 7" in output


def test_half_precision_and_a_step_that_all_ranks_skip(tmp_path: Path) -> None:
    launch(SCRIPT, "stock", str(tmp_path), "llava", "fp16", "bf16", num_processes=0)
    output = launch(SCRIPT, "half", str(tmp_path), "llava:1,2,1", num_processes=3)
    assert output.count("trainer: ") == 2


def test_a_killed_rank_ends_all_and_the_newest_checkpoint_resumes_under_another_plan(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="failed"):
        launch(SCRIPT, "die", str(tmp_path), "llava:1,1,1", "1", "save", num_processes=0)
    assert time.time() - (tmp_path / "killed" / "died").stat().st_mtime <= 30, time.monotonic() - begin
    launch(SCRIPT, "stock", str(tmp_path), "llava", "float32", num_processes=0)
    output = launch(SCRIPT, "revive", str(tmp_path), "llava:1,2,1", num_processes=3)
    assert "trainer: revived" in output


def test_the_trace_tells_what_each_rank_ran(tmp_path: Path) -> None:
    output = launch("tests.distributed.scripts.pipeline_trace", str(tmp_path), num_processes=2, timeout_s=120)
    assert output.count("trace: whole") == 1
