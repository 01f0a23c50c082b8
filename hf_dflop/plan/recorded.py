"""A recorded run, read without torch: when each rank did what in each step.

In: the folder of `DflopCallback(trace_dir=...)`, `DflopTrainer(trace_dir=...)` or `PipelineTrace`:
`trace-rank*.jsonl`, one JSON object per step with `step`, `begin_s`, `data_s`, `slot_end_s`, `sync_end_s`, `end_s`
(seconds since the epoch), and, where known, `samples` (dataset indices of each microbatch). Of a pipeline, further
`actions` (`["2F0", start_s, end_s]`: computing alone), `waits` (the same, before an action: for its input), `sends`
(handing over what the action made), `sum_s` (begin and end of summing gradients) and `meet_s` (all ranks left a
collective). `trace_version` is 2 where a line may have the last four; lines without it are of version 1. A rank names
its `host` in its first line.
Out: `RecordedStep`s.

Assumptions: all ranks leave gradient reduction together, which is how clocks of several machines are aligned; ranks of
one host have one clock.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_dflop.errors import DatasetError
from hf_dflop.plan.actions import Action

__all__ = ["TRACE_VERSION", "RankStep", "RecordedStep", "read_trace", "recorded_steps"]

TRACE_VERSION = 2

Spans = tuple[tuple[Action, float, float], ...]
"""Actions with begin and end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """One step of one rank. Moments are seconds since the epoch."""

    rank: int
    begin_s: float
    data_s: float
    slot_end_s: tuple[float, ...]
    """End of each microbatch; empty where actions were recorded instead."""
    sync_end_s: float
    """All gradients reduced and clipped; NaN where it was not seen."""
    end_s: float
    samples: tuple[tuple[int, ...], ...]
    """Dataset indices of each microbatch; empty where they were not recorded."""
    actions: Spans
    """What a pipeline's rank computed, with start and end."""
    waits: Spans = ()
    """Before an action: from when the rank was free until its input was there."""
    sends: Spans = ()
    """Handing over what an action made, as far as it kept the rank from other work."""
    sum_s: tuple[float, float] | None = None
    """Begin and end of summing gradients over replicas."""
    meet_s: float = float("nan")
    """All ranks left a collective together; NaN where only `sync_end_s` tells that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """A step that all ranks recorded."""

    step: int
    ranks: tuple[RankStep, ...]

    @property
    def step_s(self) -> float:
        """Mean seconds over the ranks, data included."""
        return float(np.mean([rank.end_s - rank.begin_s + rank.data_s for rank in self.ranks]))


def read_trace(folder: str | Path) -> list[list[dict[str, Any]]]:
    """The recorded steps of every rank: outer list over ranks, inner list over steps.

    Raises:
        FileNotFoundError: no trace in `folder`.
    """
    paths = sorted(Path(folder).glob("trace-rank*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no trace-rank*.jsonl in {folder}")
    ranks = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            ranks.append([json.loads(line) for line in file if line.endswith("\n")])
    return ranks


def recorded_steps(folder: str | Path, *, skip_steps: int = 1) -> list[RecordedStep]:
    """The steps of a run that all ranks recorded, oldest first.

    Args:
        folder (`str` or `Path`): with the files of all ranks.
        skip_steps (`int`, defaults to 1): steps left out at the start: warm-up. The last step always stays.

    Raises:
        DatasetError: no trace, or none that all ranks share.
    """
    try:
        # a resumed run repeats the steps after its checkpoint: the last record counts
        traces = read_trace(folder)
        ranks = [{int(record["step"]): record for record in records} for records in traces]
        hosts = {record["host"] for records in traces for record in records if "host" in record}
        named = all(any("host" in record for record in records) for records in traces)
        steps = sorted(set.intersection(*(set(records) for records in ranks)))
        if not steps:
            counts = [len(records) for records in ranks]
            raise DatasetError(f"the ranks in {folder} recorded {counts} steps and have none in common.")
        chosen = steps[min(skip_steps, len(steps) - 1) :]
        found = [
            RecordedStep(step=s, ranks=tuple(_rank_step(i, records[s]) for i, records in enumerate(ranks)))
            for s in chosen
        ]
    except FileNotFoundError as error:
        raise DatasetError(f"{error}; pass the trace_dir of DflopCallback or DflopTrainer.") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"the trace in {folder} is not readable ({error!r}); record it again.") from error
    return found if named and len(hosts) == 1 else _aligned(found)


def _rank_step(rank: int, record: dict[str, Any]) -> RankStep:
    if (version := int(record.get("trace_version", 1))) > TRACE_VERSION:
        raise DatasetError(
            f"the trace has version {version}; hf_dflop here reads up to {TRACE_VERSION}. Read it with a newer one."
        )
    summed = record.get("sum_s")
    return RankStep(
        rank=rank,
        begin_s=float(record["begin_s"]),
        data_s=float(record["data_s"]),
        slot_end_s=tuple(float(end) for end in record.get("slot_end_s", ())),
        sync_end_s=float("nan") if record["sync_end_s"] is None else float(record["sync_end_s"]),
        end_s=float(record["end_s"]),
        samples=tuple(tuple(int(i) for i in group) for group in record.get("samples", ())),
        actions=_spans(record, "actions"),
        waits=_spans(record, "waits"),
        sends=_spans(record, "sends"),
        sum_s=None if summed is None else (float(summed[0]), float(summed[1])),
        meet_s=float(record.get("meet_s", record["sync_end_s"] or "nan")),
    )


def _spans(record: dict[str, Any], name: str) -> Spans:
    return tuple((Action.parse(a), float(start), float(end)) for a, start, end in record.get(name, ()))


def _shifted(rank: RankStep, late_s: float) -> RankStep:
    """The step on a clock that is `late_s` behind."""

    def spans(given: Spans) -> Spans:
        return tuple((action, start - late_s, end - late_s) for action, start, end in given)

    return replace(
        rank,
        begin_s=rank.begin_s - late_s,
        slot_end_s=tuple(end - late_s for end in rank.slot_end_s),
        sync_end_s=rank.sync_end_s - late_s,
        end_s=rank.end_s - late_s,
        actions=spans(rank.actions),
        waits=spans(rank.waits),
        sends=spans(rank.sends),
        sum_s=None if rank.sum_s is None else (rank.sum_s[0] - late_s, rank.sum_s[1] - late_s),
        meet_s=rank.meet_s - late_s,
    )


def _aligned(steps: list[RecordedStep]) -> list[RecordedStep]:
    """Clocks set by the moment at which all ranks leave gradient reduction; rank 0's stays."""
    leaves = np.array([[rank.meet_s for rank in step.ranks] for step in steps])
    if not np.isfinite(leaves).all():
        return steps
    late = np.median(leaves - leaves[:, :1], axis=0)
    return [
        RecordedStep(
            step=step.step, ranks=tuple(_shifted(rank, d) for rank, d in zip(step.ranks, late.tolist(), strict=True))
        )
        for step in steps
    ]
