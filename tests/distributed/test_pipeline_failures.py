"""A rank that dies, wherever it is: the others end with an error in time, and the newest checkpoint is whole."""

from pathlib import Path

import pytest

from tests.distributed.every_case import EVERY_CASE
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


CASES = [("forward", "1"), ("backward", "0"), ("save", "2")]
"""Places, and the rank that dies there. `make test-all` runs every rank in every place."""


def test_killed_ranks_end_all_and_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    places = ",".join(place for place, _ in CASES)
    ranks = "0,1,2" if EVERY_CASE else "/".join(rank for _, rank in CASES)
    script = "tests.distributed.scripts.pipeline_kill"
    output = launch(script, str(tmp_path), places, ranks, num_processes=0, timeout_s=300)
    assert output.count("killed: rank") == (9 if EVERY_CASE else 3), output
