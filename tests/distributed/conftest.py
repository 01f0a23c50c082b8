"""What distributed tests share."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what the stock loop of the test module's `SCRIPT` does in one process."""
    made = tmp_path_factory.mktemp("stock")
    subprocess.run(
        [sys.executable, "-m", request.module.SCRIPT, "stock", str(made)], cwd=ROOT, check=True, timeout=300
    )
    return made
