"""What distributed tests share."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what the stock loop of the test module's `SCRIPT` does in one process."""
    made = tmp_path_factory.mktemp("stock")
    launch(request.module.SCRIPT, "stock", str(made), num_processes=0)
    return made
