"""Launches a script of this folder on several ranks, on loopback, with a time-out that turns a hang into a failure."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(
    module: str, *arguments: str, num_processes: int, timeout_s: float = 240, under_torchrun: bool = False
) -> str:
    """Run `python -m module arguments` in `num_processes` processes; returns what they printed.

    They are forked from one that has imported the libraries, which saves half of a short run; `under_torchrun` where
    it is torchrun's own doing that is tested.

    Raises:
        AssertionError: a process failed or did not end in time; with its output.
    """
    command = [sys.executable, "-m", "tests.distributed.forked", str(num_processes), module, *arguments]
    if under_torchrun:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
            "-m", module, *arguments,
        ]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "EXPECTED_WORLD_SIZE": str(num_processes),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"{module} hung for {timeout_s} s:\n{output[-6000:]}") from None
    assert process.returncode == 0, f"{module} failed:\n{output[-6000:]}"
    return output
