"""A hand-written Accelerate loop over a pipeline: the stock loop's losses, norms and parameters."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
SCRIPT = "tests.distributed.scripts.pipeline_loop"


def test_the_documented_example_takes_the_stock_steps_and_saves_a_stock_checkpoint(folder: Path) -> None:
    output = launch(SCRIPT, "example", str(folder), "2,1", num_processes=3)
    assert output.count("example: ") == 2


def test_losses_norms_and_resuming(folder: Path) -> None:
    output = launch(SCRIPT, "loop", str(folder), "1,2", num_processes=3)
    assert "loop: equal, and resumed" in output
