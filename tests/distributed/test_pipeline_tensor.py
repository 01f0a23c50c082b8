"""Tensor parallelism inside the stages of a pipeline: gradients, steps, checkpoints; in several processes."""

from pathlib import Path

import pytest

from tests.distributed.every_case import EVERY_CASE
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
SCRIPTS = "tests.distributed.scripts"


def test_gradients_are_those_of_one_process_and_controls_fail() -> None:
    which = "all" if EVERY_CASE else "suite"
    output = launch(f"{SCRIPTS}.pipeline_tensor", which, num_processes=5)
    assert output.count("tensor: ") == (19 if EVERY_CASE else 8)


def test_trainer_steps_saves_and_resumes_with_other_degrees(tmp_path: Path) -> None:
    script = f"{SCRIPTS}.pipeline_tensor_trainer"
    launch(script, "stock", str(tmp_path), num_processes=0)
    output = launch(script, "train", str(tmp_path), num_processes=3)
    assert output.count("trainer: ") == 1
