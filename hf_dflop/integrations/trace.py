"""A recorded run: one JSON line per optimizer step and rank.

`trace-rank00000.jsonl` holds, for each step, when its slots ended, when gradients were reduced, which samples every
slot had, and what was predicted for it. Written by `DflopCallback(trace_dir=...)`, read by reports.
"""

import json
from pathlib import Path
from typing import Any

from hf_dflop.plan.recorded import read_trace

__all__ = ["TraceWriter", "read_trace"]


class TraceWriter:
    """Appends the steps of one rank to `trace-rank<rank>.jsonl` in `folder`; starts anew at step 0."""

    def __init__(self, folder: str | Path, rank: int, *, resume: bool) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Stays open for the whole run.
        self._file = open(path / f"trace-rank{rank:05d}.jsonl", "a" if resume else "w", encoding="utf-8")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
