"""What all tests share: numba compiles once for all processes of the session, and libraries are no garbage."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import compiling

COMPILED = {"architecture", "balance", "cli", "data", "integrations", "plan", "recipes"}
"""Folders whose tests run compiled functions. Those of `distributed` wait where their ranks are forked."""
_started: list["subprocess.Popen[bytes]"] = []


def pytest_configure(config: pytest.Config) -> None:
    """While the workers of xdist start and collect; a session of one process compiles what it needs by itself."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        command = [sys.executable, "-m", "tests.compiling"]
        _started.append(subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL))


def pytest_unconfigure() -> None:
    for process in _started:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    if request.path.parent.name in COMPILED:
        with compiling():
            pass
    # A Trainer collects garbage at the begin of each run: half a second where all libraries' objects are looked at.
    gc.collect()
    gc.freeze()
