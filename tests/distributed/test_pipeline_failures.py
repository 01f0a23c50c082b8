"""A rank that dies, wherever it is: the others end with an error in time, and the newest checkpoint is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT

pytestmark = pytest.mark.distributed


def test_every_rank_is_killed_in_forward_backward_and_save(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.scripts.pipeline_kill", str(tmp_path)]
    finished = subprocess.run(
        [*command, "forward,backward,save", "0,1,2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    assert finished.stdout.count("killed: rank") == 9, finished.stdout
