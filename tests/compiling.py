"""Compiles with numba what the tests use, once for all processes of a test session: `python -m tests.compiling`.

In a fresh checkout it takes half a minute of a core, and each process that finds nothing on disk would do it again.
"""

import os
import tempfile
from pathlib import Path

from filelock import FileLock

__all__ = ["compile_all", "compiling"]


def compiling() -> FileLock:
    """Held by the process that compiles, `tests.distributed.forked` too; the others find it done."""
    return FileLock(Path(tempfile.gettempdir()) / f"hf_dflop-{os.getuid()}-compiling.lock")


def compile_all() -> None:
    """Balancing, and the planner's clock."""
    with compiling():
        import numpy as np

        from hf_dflop.balance.warmup import warm_up
        from hf_dflop.plan import Durations, choose_order, compile_schedule, step_seconds
        from hf_dflop.plan.compiled import batch_seconds

        for padded in (True, False):
            warm_up(objective="step", padded=padded)
        forward = np.ones((2, 4))
        durations = Durations.of(forward, 2 * forward)
        for schedule in ("1f1b", "data-aware"):
            choose_order(durations, schedule=schedule, stage_rank=(0, 1))
        order = compile_schedule("1f1b", (0, 1), 4)
        step_seconds(order, durations)
        batch_seconds(order, durations, durations.seconds[None])


if __name__ == "__main__":
    compile_all()
