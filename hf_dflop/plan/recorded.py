"""A recorded run, read without torch: when each rank did what in each step.

In: the folder of `DflopCallback(trace_dir=...)` or of a pipeline run, `trace-rank*.jsonl`: one JSON object per step
with `step`, `begin_s`, `data_s`, `slot_end_s`, `sync_end_s`, `end_s` (seconds since the epoch), and, where known,
`samples` (dataset indices of each microbatch) and `actions` (`["2F0", start_s, end_s]`, of a pipeline).
Out: `RecordedStep`s.

Assumptions: all ranks leave gradient reduction together, which is how clocks of several machines are aligned.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_dflop.errors import DatasetError
from hf_dflop.plan.actions import Action

__all__ = ["RankStep", "RecordedStep", "read_trace", "recorded_steps"]


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
    actions: tuple[tuple[Action, float, float], ...]
    """What a pipeline's rank computed, with start and end."""


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
        ranks = [{int(record["step"]): record for record in records} for records in read_trace(folder)]
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
        raise DatasetError(f"{error}; pass the folder of DflopCallback(trace_dir=...).") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"the trace in {folder} is not readable ({error!r}); record it again.") from error
    return _aligned(found)


def _rank_step(rank: int, record: dict[str, Any]) -> RankStep:
    return RankStep(
        rank=rank,
        begin_s=float(record["begin_s"]),
        data_s=float(record["data_s"]),
        slot_end_s=tuple(float(end) for end in record.get("slot_end_s", ())),
        sync_end_s=float("nan") if record["sync_end_s"] is None else float(record["sync_end_s"]),
        end_s=float(record["end_s"]),
        samples=tuple(tuple(int(i) for i in group) for group in record.get("samples", ())),
        actions=tuple((Action.parse(a), float(start), float(end)) for a, start, end in record.get("actions", ())),
    )


def _aligned(steps: list[RecordedStep]) -> list[RecordedStep]:
    """Clocks set by the moment at which all ranks leave gradient reduction; rank 0's stays."""
    leaves = np.array([[rank.sync_end_s for rank in step.ranks] for step in steps])
    if not np.isfinite(leaves).all():
        return steps
    late = np.median(leaves - leaves[:, :1], axis=0)
    return [
        RecordedStep(
            step=step.step,
            ranks=tuple(
                replace(
                    rank,
                    begin_s=rank.begin_s - d,
                    slot_end_s=tuple(end - d for end in rank.slot_end_s),
                    sync_end_s=rank.sync_end_s - d,
                    end_s=rank.end_s - d,
                    actions=tuple((a, start - d, end - d) for a, start, end in rank.actions),
                )
                for rank, d in zip(step.ranks, late.tolist(), strict=True)
            ),
        )
        for step in steps
    ]
