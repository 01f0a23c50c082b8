"""Launches a script of this folder on several ranks, on loopback, with a time-out that turns a hang into a failure."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Of a process that gets an environment of its own: it shall import what this one does."""


@functools.cache
def _forker(_pid: int) -> "subprocess.Popen[str]":
    """The process that launches are forked from: one for each process of the test session, while that lives."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.forked"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(module: str, *arguments: str, num_processes: int, timeout_s: float = 240) -> str:
    """Run `python -m module arguments` in `num_processes` processes; returns what they printed.

    They are forked from one that has imported the libraries, which saves half of a short run. 0 processes: one,
    without a rank.

    Raises:
        AssertionError: a process failed or did not end in time; with its output.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "EXPECTED_WORLD_SIZE": str(max(num_processes, 1)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        status = _forked(module, arguments, num_processes, environment, output, timeout_s)
        told = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    assert status is not None, f"{module} hung for {timeout_s} s:\n{told[-6000:]}"
    assert status == 0, f"{module} failed:\n{told[-6000:]}"
    return told


def _forked(
    module: str,
    arguments: tuple[str, ...],
    num_processes: int,
    environment: dict[str, str],
    output: Path,
    timeout_s: float,
) -> int | None:
    """Exit status; None: it hung."""
    forker = _forker(os.getpid())
    assert forker.stdin is not None
    assert forker.stdout is not None
    asked = {"module": module, "arguments": arguments, "num_processes": num_processes, "environment": environment}
    forker.stdin.write(json.dumps(asked | {"output": str(output)}) + "\n")
    forker.stdin.flush()
    group = int(forker.stdout.readline())
    hung = not select.select([forker.stdout], [], [], timeout_s)[0]
    if hung:
        os.killpg(group, signal.SIGKILL)
    status = int(forker.stdout.readline())
    return None if hung else status
