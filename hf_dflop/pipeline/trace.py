"""Writes what a pipeline really ran: one JSON line per optimizer step and rank, beside a simulation's prediction.

In: a `PipelineModel`, a folder. Out: `trace-rank00000.jsonl` and so on, which `hf-dflop simulate --against` and
`hf_dflop.plan.recorded` read.

A line is written when the step after it has ended, so that nothing waits for the device.
"""

import json
import socket
from pathlib import Path
from typing import Any

from hf_dflop.pipeline.batch import StepBatch
from hf_dflop.pipeline.bridge import route_step
from hf_dflop.pipeline.model import PipelineModel
from hf_dflop.pipeline.recorder import StepRecord, StepRecorder
from hf_dflop.plan.recorded import TRACE_VERSION

__all__ = ["PipelineTrace"]


class PipelineTrace:
    """Records the steps of a pipeline in a folder, each rank in a file of its own.

    Args:
        pipe ([`PipelineModel`]): the pipeline; recorded until `close`.
        folder (`str` or `Path`): made if it is not there; all ranks write into it.
        resume (`bool`, defaults to `False`): go on with the files that are there, instead of anew.

    Example:

    ```python
    with PipelineTrace(pipe, "run/trace") as trace:
        for batch in batches:
            pipe.step(batch)
            pipe.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            trace.end_step(batch)
    ```
    """

    def __init__(self, pipe: PipelineModel, folder: str | Path, *, resume: bool = False) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._pipe = pipe
        self._recorder = StepRecorder(pipe.wire.device)
        self._told: list[dict[str, Any]] = []
        self._step = 0
        self._is_first = True
        name = f"trace-rank{pipe.place.rank:05d}.jsonl"
        # Stays open for the whole run.
        self._file = open(path / name, "a" if resume else "w", encoding="utf-8")  # noqa: SIM115
        pipe.record(self._recorder)

    def __enter__(self) -> "PipelineTrace":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def end_step(self, *batches: StepBatch, step: int | None = None, epoch: int = 0) -> None:
        """The optimizer is done with a step.

        Args:
            batches ([`StepBatch`]): of the step's calls; their `samples` go into the trace.
            step (`int`, *optional*): number of the step; by default they are counted.
            epoch (`int`, defaults to 0): of the step.
        """
        number = self._step if step is None else step
        if not self._recorder.end_step():
            return
        self._step = number + 1
        self._told.append({"step": number, "epoch": epoch, "samples": self._samples(batches)})
        self._write(keep=1)

    def pause(self) -> None:
        """Something that is no training step comes next (evaluation, saving): do not count it as waiting for data."""
        self._recorder.pause()

    def close(self) -> None:
        """Write what is left, and record no more."""
        if not self._file.closed:
            self._write()
            self._file.close()
            self._pipe.record(None)

    def _samples(self, batches: tuple[StepBatch, ...]) -> list[list[int]]:
        """Dataset indices of each microbatch that this rank works on."""
        place, topology = self._pipe.place, self._pipe.topology
        found: list[list[int]] = []
        for batch in batches:
            if not batch.samples:
                return []
            if place.is_llm:
                found += [list(replicas[place.replica]) for replicas in batch.samples]
                continue
            routes = route_step(batch.shape, topology.replicas(0), colocated=not topology.disjoint)
            for replicas, route in zip(batch.samples, routes, strict=True):
                found.append([replicas[replica][i] for replica, i in route.samples[place.replica]])
        return found

    def _write(self, *, keep: int = 0) -> None:
        for record in self._recorder.drain(keep=keep):
            told = self._told.pop(0)
            self._file.write(json.dumps(self._line(record, told), separators=(",", ":")) + "\n")
        self._file.flush()

    def _line(self, record: StepRecord, told: dict[str, Any]) -> dict[str, Any]:
        line = {
            "trace_version": TRACE_VERSION,
            "step": told["step"],
            "epoch": told["epoch"],
            "rank": self._pipe.place.rank,
            "num_ranks": self._pipe.plan.num_ranks,
            "begin_s": record.begin_s,
            "data_s": record.data_s,
            "slot_end_s": [],
            "actions": record.actions,
            "waits": record.waits,
            "sends": record.sends,
            "sum_s": record.sum_s,
            "meet_s": record.meet_s,
            "sync_end_s": record.sync_end_s,
            "end_s": record.end_s,
            "samples": told["samples"],
        }
        if self._is_first:
            line["host"] = socket.gethostname()
            self._is_first = False
        return line
