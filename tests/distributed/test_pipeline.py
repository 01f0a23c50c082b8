"""The pipeline against the stock model: gradients, schedules, steps, checkpoints; in several processes."""

import signal

import pytest

from tests.distributed.every_case import EVERY_CASE
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
SCRIPTS = "tests.distributed.scripts"


def test_gradients_are_those_of_one_process() -> None:
    output = launch(f"{SCRIPTS}.pipeline_gradients", "suite", num_processes=5)
    assert output.count("gradients: ") >= (7 + 7 if EVERY_CASE else 7 + 3) + 10


def test_schedules_placements_and_negative_controls() -> None:
    output = launch(f"{SCRIPTS}.pipeline_schedules", "all", num_processes=5)
    assert output.count("schedules: ") >= (73 if EVERY_CASE else 42)


def test_gradients_of_videos_are_those_of_one_process() -> None:
    which, size, timeout_s = ("all", 6, 500) if EVERY_CASE else ("suite", 3, 240)
    output = launch(f"{SCRIPTS}.pipeline_videos", which, num_processes=size, timeout_s=timeout_s)
    if "videos: refused" in output:
        pytest.skip("models of this transformers take no features of videos, and the pipeline refused them")
    assert output.count("videos: ") == (92 if EVERY_CASE else 20)


def test_ten_steps_and_a_stock_checkpoint() -> None:
    output = launch(f"{SCRIPTS}.pipeline_steps", "llava", "2,1,2", "float64", "1", num_processes=4)
    assert output.count("steps: ") == 1


def test_ten_steps_and_a_stock_checkpoint_with_the_encoder_in_stages() -> None:
    output = launch(f"{SCRIPTS}.pipeline_steps", "qwen2_5_vl", "1,1,1", "float64", "2,2", num_processes=3)
    assert output.count("steps: ") == 1


def test_ranks_read_nothing_of_the_files_of_others() -> None:
    output = launch(f"{SCRIPTS}.pipeline_reading", "share", num_processes=3)
    assert output.count("reading: ") == 3
    with pytest.raises(AssertionError, match=f"rank 0 ended with status -{signal.SIGBUS:d}"):
        launch(f"{SCRIPTS}.pipeline_reading", "whole", num_processes=1)


def test_no_rank_holds_more_than_the_planner_foresees() -> None:
    output = launch(f"{SCRIPTS}.pipeline_memory", num_processes=3)
    assert output.count("memory: ") == (9 if EVERY_CASE else 7)
