"""A recorded run → who waited for whom, and which microbatches cost more than predicted.

Input: the folder of `DflopCallback(trace_dir=...)`, with a file of every rank. Output: a `StragglerReport`.

What is predicted may be in any unit (FLOPs of which only ratios matter), so the predictions of each cost version are
multiplied by the median of measured ÷ predicted over its microbatches: what is reported is how microbatches and ranks
differ from that.

Assumptions: those of `timing`: ranks meet once per step. The clocks of ranks need not agree: only durations of one
rank are subtracted from each other.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_dflop.integrations.module_factors import module_factors
from hf_dflop.integrations.trace import Trace, load_trace
from hf_dflop.integrations.verdict import usual_slowdown, verdict

__all__ = [
    "RankTimes",
    "SlowMicrobatch",
    "StragglerReport",
    "microbatches_of",
    "report_of",
    "some_samples",
    "straggler_report",
]

_SLOW = 1.10


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTimes:
    """Where the seconds of a rank's mean step went."""

    rank: int
    data_s: float
    """Fetching and collating."""
    busy_s: float
    """Own forward and backward computation."""
    idle_s: float
    """Waiting for the slowest rank."""
    slowest_share: float
    """Share of the steps in which this rank computed longest."""
    slowdown: float
    """Measured ÷ predicted seconds of its microbatches; 1 is what is usual in this run. A rank far above 1 is slow
    itself; a slow rank near 1 was given more work. NaN without predictions."""
    host: str = ""
    """Name of its machine, if it was recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowMicrobatch:
    """A microbatch that took longer than predicted."""

    step: int
    rank: int
    slot: int
    measured_s: float
    predicted_s: float
    """In measured seconds: multiplied by the median of measured ÷ predicted of its cost version."""
    samples: tuple[int, ...]
    """Dataset indices."""
    vision_share: float = float("nan")
    """Share of the vision encoder in what was predicted."""
    cost_version: int = 0

    @property
    def module(self) -> str:
        """The module that most of it was predicted to go to; empty when that was not recorded."""
        if self.vision_share != self.vision_share:
            return ""
        return "vision" if self.vision_share >= 0.5 else "LLM"

    @property
    def ratio(self) -> float:
        """Measured ÷ predicted."""
        return self.measured_s / self.predicted_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StragglerReport:
    """Who waited for whom; `summary()` says it in words."""

    num_steps: int
    """Steps that all ranks recorded, without those left out."""
    step_s: float
    """Mean step, data included."""
    sync_s: float
    """Mean seconds of gradient reduction and clipping that are not hidden: of the slowest rank of each step."""
    optimizer_s: float
    ranks: tuple[RankTimes, ...]
    slowest_rank: int | None
    """The rank with the most busy seconds; None when busy seconds could not be measured."""
    idle_fraction: float
    """Seconds that the mean rank waited ÷ step seconds."""
    scale: float
    """Median of measured ÷ predicted over all microbatches of the last cost version."""
    prediction_error: float
    """Mean of |measured − scale × predicted| ÷ mean of measured, over all microbatches."""
    slowest_microbatches: tuple[SlowMicrobatch, ...]
    """Largest measured ÷ predicted first."""
    factors: tuple[float, float] | None = None
    """Measured ÷ predicted of (vision, LLM) under the last cost version, 1 being usual; None when the microbatches do
    not tell the two apart."""
    num_cost_versions: int = 0
    """How often the costs were corrected in the steps of the report."""
    missing_ranks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """What of the trace is not whole."""

    @property
    def slow_ranks(self) -> tuple[RankTimes, ...]:
        """Ranks that take at least 1.1 times as long for the same work as the usual rank."""
        usual = usual_slowdown(self)
        return tuple(rank for rank in self.ranks if rank.slowdown >= _SLOW * usual)

    def verdict(self) -> list[str]:
        """What the seconds say, in a few sentences, the most important first."""
        return verdict(self)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return asdict(self) | {"verdict": self.verdict(), "slow_ranks": [rank.rank for rank in self.slow_ranks]}

    def summary(self) -> str:
        """The report as text."""
        lines = [f"{self.num_steps} steps on {len(self.ranks)} ranks, {_ms(self.step_s)} each"]
        lines += [f"NOT WHOLE: {note}" for note in self.notes]
        if self.slowest_rank is None:
            lines.append("busy and idle time was not measured: no gradient hook ran (FSDP shards)")
        else:
            slow = next(rank for rank in self.ranks if rank.rank == self.slowest_rank)
            mean_s = float(np.mean([rank.busy_s for rank in self.ranks]))
            lines += [
                f"rank {slow.rank} computes longest: {_ms(slow.busy_s)} busy per step, the mean rank {_ms(mean_s)}; "
                f"it is the slowest in {slow.slowest_share:.0%} of the steps",
                f"the mean rank waits {self.idle_fraction:.1%} of the step; reducing gradients takes "
                f"{_ms(self.sync_s)}, the optimizer {_ms(self.optimizer_s)}",
            ]
        lines.append(f"{'rank':>6} {'busy':>10} {'idle':>10} {'data':>10} {'slowest in':>11} {'vs predicted':>13}")
        for rank in self.ranks:
            lines.append(
                f"{rank.rank:>6} {_ms(rank.busy_s):>10} {_ms(rank.idle_s):>10} {_ms(rank.data_s):>10} "
                f"{rank.slowest_share:>11.0%} {rank.slowdown:>12.2f}x"
            )
        if self.slowest_microbatches:
            lines.append(
                f"predictions (x {self.scale:.3g}) are off by {self.prediction_error:.1%} of a microbatch on average; "
                "the most underestimated:"
            )
        for slow_one in self.slowest_microbatches:
            mostly = f", mostly {slow_one.module}" if slow_one.module else ""
            lines.append(
                f"  step {slow_one.step}, rank {slow_one.rank}, microbatch {slow_one.slot}: "
                f"{_ms(slow_one.measured_s)}, predicted {_ms(slow_one.predicted_s)} ({slow_one.ratio:.2f}x"
                f"{mostly}); samples {some_samples(slow_one.samples)}"
            )
        return "\n".join(lines)


def straggler_report(trace_dir: str | Path, *, skip_steps: int = 1, num_microbatches: int = 5) -> StragglerReport:
    """Read a recorded run and tell who waited for whom.

    Args:
        trace_dir (`str` or `Path`): the folder given to `DflopCallback(trace_dir=...)`, with the files of all ranks.
        skip_steps (`int`, defaults to 1): recorded steps left out at the start: warm-up. The last step always stays.
        num_microbatches (`int`, defaults to 5): how many of the most underestimated microbatches to name.

    Returns:
        [`StragglerReport`]: of the steps that all ranks recorded; `notes` says what is missing.

    Raises:
        FileNotFoundError: no trace in the folder.
        DatasetError: nothing can be read, or the ranks have no step in common, as when files of different runs are
            mixed.

    Example:
        >>> print(straggler_report("trace/").summary())                                 # doctest: +SKIP
        90 steps on 2 ranks, 412.0 ms each
        rank 1 computes longest: 371.5 ms busy per step, the mean rank 350.2 ms; ...
    """
    return report_of(load_trace(trace_dir), skip_steps=skip_steps, num_microbatches=num_microbatches)


def report_of(trace: Trace, *, skip_steps: int = 1, num_microbatches: int = 5) -> StragglerReport:
    """`straggler_report` of a trace that is loaded already."""
    steps = trace.steps
    ranks = [trace.ranks[rank] for rank in sorted(trace.ranks)]
    steps = steps[min(skip_steps, len(steps) - 1) :]
    table = [[records[step] for step in steps] for records in ranks]
    begin = np.array([[r["begin_s"] for r in records] for records in table])  # (num_ranks, num_steps)
    data = np.array([[r["data_s"] for r in records] for records in table])
    busy_end = np.array([[(r["slot_end_s"] or [np.nan])[-1] for r in records] for records in table])
    sync_end = np.array([[r["sync_end_s"] for r in records] for records in table])
    end = np.array([[r["end_s"] for r in records] for records in table])
    busy, sync, step_s = busy_end - begin, sync_end - busy_end, end - begin + data
    is_measured = bool(np.isfinite(busy).all() and np.isfinite(sync).all())
    idle = sync - sync.min(axis=0)
    slowest = np.bincount(busy.argmax(axis=0), minlength=len(ranks)) / len(steps) if is_measured else None

    microbatches = [
        found for records in table for record in records for found in microbatches_of(record) if found.measured_s > 0
    ]
    scales = {
        version: float(np.median([found.ratio for found in microbatches if found.cost_version == version]))
        for version in sorted({found.cost_version for found in microbatches})
    }
    scaled = [replace(found, predicted_s=found.predicted_s * scales[found.cost_version]) for found in microbatches]
    measured = np.array([found.measured_s for found in scaled])
    predicted = np.array([found.predicted_s for found in scaled])
    of_rank = np.array([found.rank for found in scaled])
    names = sorted(trace.ranks)
    last = max(scales, default=0)
    newest = [found for found in scaled if found.cost_version == last]
    return StragglerReport(
        num_steps=len(steps),
        step_s=float(step_s.mean()),
        sync_s=float(sync.min(axis=0).mean()),
        optimizer_s=float((end - sync_end).mean()),
        ranks=tuple(
            RankTimes(
                rank=name,
                data_s=float(data[r].mean()),
                busy_s=float(busy[r].mean()),
                idle_s=float(idle[r].mean()),
                slowest_share=float(slowest[r]) if slowest is not None else float("nan"),
                slowdown=float(measured[of_rank == name].sum() / predicted[of_rank == name].sum())
                if (of_rank == name).any()
                else float("nan"),
                host=next((str(record["host"]) for record in ranks[r].values() if "host" in record), ""),
            )
            for r, name in enumerate(names)
        ),
        slowest_rank=names[int(busy.mean(axis=1).argmax())] if is_measured else None,
        idle_fraction=float(idle.mean() / step_s.mean()),
        scale=scales.get(last, float("nan")),
        prediction_error=float(np.abs(measured - predicted).mean() / measured.mean()) if scaled else float("nan"),
        slowest_microbatches=tuple(sorted(scaled, key=lambda found: -found.ratio)[:num_microbatches]),
        factors=module_factors(
            np.array([found.measured_s for found in newest]),
            np.array([found.predicted_s for found in newest]),
            np.array([found.vision_share for found in newest]),
        ),
        num_cost_versions=len(scales) - 1 if scales else 0,
        missing_ranks=trace.missing_ranks,
        notes=trace.notes,
    )


def microbatches_of(record: dict[str, Any]) -> list[SlowMicrobatch]:
    """What was measured and predicted for each slot; nothing where one of the two is missing."""
    edges = [record["begin_s"], *record["slot_end_s"]]
    predicted = record.get("slot_predicted_s", [])
    if len(edges) != len(predicted) + 1 or not all(value > 0 for value in predicted):
        return []
    vision = record.get("slot_vision_s")
    return [
        SlowMicrobatch(
            step=int(record["step"]),
            rank=int(record["rank"]),
            slot=slot,
            measured_s=edges[slot + 1] - edges[slot],
            predicted_s=predicted[slot],
            samples=tuple(record["samples"][slot]),
            vision_share=float("nan") if vision is None else vision[slot] / predicted[slot],
            cost_version=int(record.get("cost_version", 0)),
        )
        for slot in range(len(predicted))
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def some_samples(samples: tuple[int, ...]) -> str:
    """The first few of many sample indices."""
    shown = ", ".join(map(str, samples[:8]))
    return shown + (f", ... ({len(samples)})" if len(samples) > 8 else "")
