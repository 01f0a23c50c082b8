"""A rank that dies, wherever it is: the others end with an error in time, and the newest checkpoint is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.every_case import EVERY_CASE
from tests.distributed.launch import ROOT

pytestmark = pytest.mark.distributed


CASES = [("forward", "1"), ("backward", "0"), ("save", "2")]
"""Places, and the rank that dies there. `make test-all` runs every rank in every place."""


def test_killed_ranks_end_all_and_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    places = ",".join(place for place, _ in CASES)
    ranks = "0,1,2" if EVERY_CASE else "/".join(rank for _, rank in CASES)
    command = [sys.executable, "-m", "tests.distributed.scripts.pipeline_kill", str(tmp_path)]
    finished = subprocess.run(
        [*command, places, ranks],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    assert finished.stdout.count("killed: rank") == (9 if EVERY_CASE else 3), finished.stdout
