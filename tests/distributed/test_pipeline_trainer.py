"""Trainer over a pipeline: the stock run's losses, norms and parameters; resumed bit by bit; a killed rank."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, launch

pytestmark = pytest.mark.distributed
SCRIPT = "tests.distributed.scripts.pipeline_trainer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what the stock Trainer does in one process."""
    made = tmp_path_factory.mktemp("trainer")
    subprocess.run([sys.executable, "-m", SCRIPT, "stock", str(made)], cwd=ROOT, check=True, timeout=180)
    return made


def test_ten_steps_resume_and_stock_checkpoint(folder: Path) -> None:
    output = launch(SCRIPT, "train", str(folder), "1,2,1", num_processes=3)
    assert output.count("trainer: ") == 3


def test_a_killed_rank_ends_all_and_the_newest_checkpoint_resumes_under_another_plan(folder: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="failed"):
        launch(SCRIPT, "die", str(folder), "1,2,1", "2", "save", num_processes=3, under_torchrun=True)
    assert time.time() - (folder / "killed" / "died").stat().st_mtime <= 30, time.monotonic() - begin
    output = launch(SCRIPT, "revive", str(folder), "1,1,1", num_processes=2)
    assert "trainer: revived" in output
