"""Tensor parallelism inside the stages of a pipeline: gradients, steps, checkpoints; in several processes."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
SCRIPTS = "tests.distributed.scripts"


def test_gradients_are_those_of_one_process_and_controls_fail() -> None:
    output = launch(f"{SCRIPTS}.pipeline_tensor", "suite", num_processes=5)
    assert output.count("tensor: ") == 8


def test_trainer_steps_saves_and_resumes_with_other_degrees(tmp_path: Path) -> None:
    script = f"{SCRIPTS}.pipeline_tensor_trainer"
    launch(script, "stock", str(tmp_path), num_processes=0)
    output = launch(script, "train", str(tmp_path), num_processes=3)
    assert output.count("trainer: ") == 1
