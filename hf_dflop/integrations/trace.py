"""A recorded run: one JSON line per optimizer step and rank.

`trace-rank00000.jsonl` holds, for each step, when its slots ended, when gradients were reduced, which samples every
slot had, and what was predicted for it. Written by `DflopCallback(trace_dir=...)`, read by reports.
"""

import json
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_dflop.data.step_plan import StepPlan
from hf_dflop.errors import DatasetError
from hf_dflop.integrations.timing import StepTiming
from hf_dflop.plan.recorded import read_trace

__all__ = ["Trace", "TraceWriter", "load_trace", "read_trace", "step_record"]


class TraceWriter:
    """Appends the steps of one rank to `trace-rank<rank>.jsonl` in `folder`; starts anew at step 0."""

    def __init__(self, folder: str | Path, rank: int, *, resume: bool) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._is_first = True
        # Stays open for the whole run.
        self._file = open(path / f"trace-rank{rank:05d}.jsonl", "a" if resume else "w", encoding="utf-8")  # noqa: SIM115

    def write_step(
        self, timing: StepTiming, step: int, epoch: int, plan: StepPlan | None, *, num_ranks: int, sampler: Any
    ) -> None:
        """Append one step of this rank; `sampler` predicts what its microbatches take."""
        record = step_record(timing, step, epoch, plan, rank=self._rank, num_ranks=num_ranks, sampler=sampler)
        if self._is_first:
            record["host"] = socket.gethostname()
            self._is_first = False
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def step_record(
    timing: StepTiming,
    step: int,
    epoch: int,
    plan: StepPlan | None,
    *,
    rank: int,
    num_ranks: int,
    sampler: Any,
) -> dict[str, Any]:
    """What the trace keeps of one step of a rank."""
    record: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "rank": rank,
        "num_ranks": num_ranks,
        "begin_s": timing.begin_s,
        "data_s": timing.data_s,
        "slot_end_s": timing.slot_end_s,
        "sync_end_s": timing.sync_end_s,
        "end_s": timing.end_s,
    }
    if plan is None:
        return record
    samples = plan.microbatches(rank)
    record["samples"] = samples
    if plan.cost_version is not None:
        version = plan.cost_version
        modules = sampler.costs.module_seconds(samples, version)
        record["cost_version"] = version.number
        record["slot_predicted_s"] = (modules.sum(axis=1) + version.model.per_microbatch_s).tolist()
        record["slot_vision_s"] = modules[:, 0].tolist()
        if version.rank_speeds is not None:
            record["rank_speed"] = version.rank_speeds[rank]
    else:
        record["slot_predicted_s"] = [sampler.microbatch_s(group) for group in samples]
    record["predicted_s"] = plan.assignment.predicted_s
    record["predicted_stock_s"] = plan.assignment.baseline_s
    record["bound_s"] = plan.assignment.bound_s
    record["scheduling_s"] = plan.scheduling_s
    record["scheduling_wait_s"] = plan.scheduling_wait_s
    return record


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A recorded run, as far as it can be read."""

    ranks: dict[int, dict[int, dict[str, Any]]]
    """rank → step → record; of a step that a resumed run repeated, the last record."""
    missing_ranks: tuple[int, ...]
    """Ranks that the others tell of, but that left no file."""
    notes: tuple[str, ...]
    """What is not whole, in sentences; empty for a complete trace."""

    @property
    def steps(self) -> list[int]:
        """Steps that all ranks recorded."""
        return sorted(set.intersection(*(set(records) for records in self.ranks.values())))


def load_trace(folder: str | Path) -> Trace:
    """Read a recorded run, leaving out what cannot be read and saying so.

    Args:
        folder (`str` or `Path`): the folder of `DflopCallback(trace_dir=...)`, or one that holds it.

    Raises:
        FileNotFoundError: no trace in the folder, or several.
        DatasetError: the ranks have no readable step in common.
    """
    folder = _trace_folder(Path(folder))
    ranks: dict[int, dict[int, dict[str, Any]]] = {}
    notes = []
    for path in sorted(folder.glob("trace-rank*.jsonl")):
        records, num_broken = _records(path)
        rank = int(path.stem.removeprefix("trace-rank"))
        if num_broken:
            notes.append(f"{path.name}: {num_broken} lines cannot be read (the run was cut off while writing).")
        if records:
            ranks[rank] = records
        else:
            notes.append(f"{path.name} has no readable step: rank {rank} is left out.")
    if not ranks:
        raise DatasetError(f"no step can be read from the trace in {folder}: the run ended before its first log")
    told = max(int(record.get("num_ranks", 0)) for records in ranks.values() for record in records.values())
    missing = tuple(rank for rank in range(max(told, max(ranks) + 1)) if rank not in ranks)
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        notes.append(
            f"{len(missing)} of {len(missing) + len(ranks)} ranks left no steps here ({shown}). Waiting is counted "
            "among the others: it is at least as long as shown. On several machines, gather the files in one folder."
        )
    trace = Trace(ranks=ranks, missing_ranks=missing, notes=())
    if not trace.steps:
        counts = [len(records) for records in ranks.values()]
        raise DatasetError(
            f"the traces of the {len(ranks)} ranks in {folder} ({counts} steps) have no step in common: keep only "
            "the files of one run in the folder"
        )
    ends = {rank: max(records) for rank, records in ranks.items()}
    if len(set(ends.values())) > 1:
        first = min(ends, key=lambda rank: (ends[rank], rank))
        notes.append(
            f"rank {first} ends at step {ends[first]}, others go on to step {max(ends.values())}: only the "
            f"{len(trace.steps)} steps of all are counted."
        )
    return replace(trace, notes=tuple(notes))


def _trace_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if any(folder.glob("trace-rank*.jsonl")):
        return folder
    inside = sorted({path.parent for path in folder.glob("*/trace-rank*.jsonl")})
    if not inside:
        raise FileNotFoundError(
            f"no trace-rank*.jsonl in {folder}: give the folder that was DflopCallback(trace_dir=...)"
        )
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside[:5])
        raise FileNotFoundError(f"{folder} holds the traces of several runs ({names}): name one of them")
    return inside[0]


def _records(path: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """Readable records by step, and the number of lines that are not."""
    records = {}
    num_broken = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                begin, end = float(record["begin_s"]), float(record["end_s"])
                _ = [float(moment) for moment in record["slot_end_s"]], float(record["sync_end_s"]), record["data_s"]
                if end < begin:
                    raise ValueError
                records[int(record["step"])] = record
            except (ValueError, KeyError, TypeError):
                num_broken += 1
    return records, num_broken
