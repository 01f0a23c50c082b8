"""How far the simulator is from a recorded run, and the correction that brings it nearer.

In: recorded steps with their samples, the plan that ran, a cost model, the dataset's shapes. Out: a `Comparison`: the
error of each kind of action, of the whole step, and a `Calibration`.

Where a run recorded its actions (the pipeline engine), each is compared; otherwise forward and backward of a
microbatch together. The recorded samples are simulated in the recorded microbatches, with gradients summed as the
engine that ran sums them, so that what differs is the cost model and not the draw. The fit uses every second step; its
error is reported on the others.

Assumptions: replica r of the LLM is rank r of the run where nothing is pipelined; otherwise the plan's ranks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import CostModel
from hf_dflop.errors import DatasetError
from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.calibration import ACTION_KINDS, Calibration, fit_relative
from hf_dflop.plan.network import Communication
from hf_dflop.plan.orders import make_order
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.recorded import RankStep, RecordedStep
from hf_dflop.plan.simulate import most_in_flight, simulate_order
from hf_dflop.plan.simulation import Simulation, stage_tokens
from hf_dflop.plan.stage_seconds import StageSeconds, first_backward_stage, sample_seconds, stage_seconds
from hf_dflop.plan.step import calibrated, plan_stage_ranks, rank_of_line, step_durations
from hf_dflop.plan.step_memory import StepMemory, step_memory
from hf_dflop.plan.timeline import Timeline
from hf_dflop.shapes import Shapes

__all__ = ["Comparison", "KindError", "compare_run"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class KindError:
    """How far predictions of one kind are off."""

    kind: str
    count: int
    measured_s: float
    """Mean."""
    predicted_s: float
    """Mean."""
    ratio: float | None
    """Measured ÷ predicted; None where nothing was predicted."""
    error: float | None
    """Median of |predicted − measured| ÷ measured."""
    error_after: float | None
    """The same with the calibration, on steps that it was not fitted to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A run beside its simulation."""

    kinds: tuple[KindError, ...]
    """Kinds of actions, then reduction, optimizer, data, and "step"."""
    calibration: Calibration
    """Brings predictions nearer to this run."""
    helps: bool
    """On the steps that it was not fitted to, the calibration reduces the error of the whole step."""
    num_steps: int
    replayed: Simulation
    """The recorded microbatches of each step, simulated, without the new calibration."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {
            "num_steps": self.num_steps,
            "calibration_helps": self.helps,
            "kinds": [asdict(kind) for kind in self.kinds],
            "calibration": self.calibration.to_dict(),
        }

    def summary(self) -> str:
        """The comparison as a text table."""
        lines = [
            f"{self.num_steps} recorded steps",
            f"{'':<18}{'measured':>12}{'predicted':>12}{'ratio':>8}{'error':>9}{'after fit':>11}",
        ]
        for kind in self.kinds:
            ratio = "–" if kind.ratio is None else f"{kind.ratio:.3g}"
            errors = ["–" if e is None else f"{e:.1%}" for e in (kind.error, kind.error_after)]
            lines.append(
                f"{kind.kind:<18}{kind.measured_s * 1e3:>9.2f} ms{kind.predicted_s * 1e3:>9.2f} ms{ratio:>8}"
                f"{errors[0]:>9}{errors[1]:>11}"
            )
        return "\n".join(lines)


def compare_run(
    plan: Plan,
    steps: Sequence[RecordedStep],
    shapes: Shapes,
    cost: CostModel,
    *,
    communication: Communication | None = None,
    wire_bytes: int = 2,
    optimizer_s: float = 0.0,
    calibration: Calibration | None = None,
) -> Comparison:
    """Compare a recorded run with its simulation, and fit a correction.

    Args:
        plan (`Plan`): what ran.
        steps (`Sequence[RecordedStep]`): see `recorded_steps`; warm-up left out.
        shapes (`Shapes`): of the dataset that the recorded sample indices point into.
        cost (`CostModel`): to be judged.
        communication, wire_bytes, optimizer_s: as for `simulate`.
        calibration (`Calibration`, *optional*): an earlier one, under which predictions are made; the new one is
            fitted from scratch and replaces it.

    Raises:
        DatasetError: the run has other ranks or microbatches than the plan, or samples that the dataset has not.
    """
    _check(plan, steps, shapes)
    runs = [_predict(plan, cost, shapes, step) for step in steps]
    fitted = _fit(plan, runs[::2], cost)
    held = runs[1::2] or runs
    kinds = []
    for kind in (*ACTION_KINDS, "microbatch"):
        pairs = [_pairs(plan, run, kind, calibration) for run in runs]
        measured, predicted = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        if not measured.size:
            continue
        after = [_pairs(plan, run, kind, fitted) for run in held]
        held_measured, held_predicted = (np.concatenate([pair[i] for pair in after]) for i in (0, 1))
        kinds.append(_error(kind, measured, predicted, _relative(held_measured, held_predicted)))

    def played(run: "_Run", with_: Calibration | None) -> Timeline:
        return _play(plan, cost, run, communication, wire_bytes, optimizer_s, with_)

    sync = np.array([run.sync_s for run in runs])
    own_optimizer = np.array([run.optimizer_s for run in runs])
    data = np.array([run.data_s for run in runs])
    durations = step_durations(
        plan,
        cost,
        runs[0].stages,
        communication=communication,
        wire_bytes=wire_bytes,
        by_pipeline=bool(runs[0].actions),
    )
    tail = durations.reduce_s if durations.reduce_tail_s is None else durations.reduce_tail_s
    for kind, values, guess in (
        ("reduce", sync, float(np.max(tail)) if calibration is None else calibration.reduce_s or 0.0),
        ("optimizer", own_optimizer, optimizer_s if calibration is None else calibration.optimizer_s or 0.0),
        ("data", data, 0.0 if calibration is None else calibration.data_s or 0.0),
    ):
        seen = values[np.isfinite(values)]
        if seen.size:
            kinds.append(_error(kind, seen, np.full(seen.size, guess), None))
    measured = np.array([run.step_s for run in runs])
    timelines = tuple(played(run, calibration) for run in runs)
    predicted = np.array([timeline.step_s for timeline in timelines])
    after_s = np.array([played(run, fitted).step_s for run in held])
    before_s = np.array([played(run, calibration).step_s for run in held])
    held_s = np.array([run.step_s for run in held])
    kinds.append(_error("step", measured, predicted, _relative(held_s, after_s)))
    helps = float(np.abs(after_s - held_s).sum()) < float(np.abs(before_s - held_s).sum())
    replayed = Simulation(
        plan=plan,
        timelines=timelines,
        num_samples=sum(len(group) for group in runs[0].groups),
        peak_tokens=np.max([_tokens(plan, run) for run in runs], axis=0),
        peak_bytes=np.max([run.memory.peak_bytes(line) for run, line in zip(runs, timelines, strict=True)], axis=0),
        planning_s=0.0,
    )
    return Comparison(kinds=tuple(kinds), calibration=fitted, helps=helps, num_steps=len(steps), replayed=replayed)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """A recorded step and what was predicted of it."""

    groups: tuple[tuple[int, ...], ...]
    """Samples of every microbatch of every replica."""
    stages: StageSeconds
    memory: StepMemory
    slot_s: FloatArray
    """`(num_llm_replicas, num_microbatches)` measured; empty where actions were recorded."""
    actions: tuple[tuple[int, Action, float], ...]
    """(replica, action, measured seconds)."""
    sync_s: float
    optimizer_s: float
    data_s: float
    step_s: float


def _check(plan: Plan, steps: Sequence[RecordedStep], shapes: Shapes) -> None:
    if not steps:
        raise DatasetError("the run has no recorded steps.")
    ranks = len(steps[0].ranks)
    if ranks != plan.num_ranks:
        raise DatasetError(f"the run has {ranks} ranks, the plan {plan.num_ranks}; pass the plan that ran.")
    for rank in (rank for step in steps for rank in step.ranks):
        if not rank.samples:
            raise DatasetError("the run recorded no samples; record it with DflopCallback(trace_dir=...).")
        if len(rank.samples) != plan.num_microbatches:
            raise DatasetError(
                f"rank {rank.rank} ran {len(rank.samples)} microbatches, the plan has {plan.num_microbatches}; pass "
                "the plan that ran."
            )
        most = max((max(group, default=0) for group in rank.samples), default=0)
        if most >= len(shapes):
            raise DatasetError(f"the run used sample {most}, the profile has {len(shapes)}: it is of another dataset.")


def _predict(plan: Plan, cost: CostModel, shapes: Shapes, step: RecordedStep) -> _Run:
    ranks = plan_stage_ranks(plan)
    lines = {
        rank_of_line(plan, p, r): (p, r)
        for p in range(max(ranks) + 1)
        for r in range(plan.llm.dp if ranks.index(p) >= plan.vision.num_stages or p == ranks[-1] else plan.vision.dp)
    }
    first = max(p for p, _ in lines.values())  # the last stage's ranks know the LLM's samples
    groups = [
        [list(group) for group in next(k for k in step.ranks if lines.get(k.rank) == (first, r)).samples]
        for r in range(plan.llm.dp)
    ]
    flat = np.array([sample for rank in groups for group in rank for sample in group], dtype=np.int64)
    number = iter(range(flat.size))
    local = [[[next(number) for _ in group] for group in rank] for rank in groups]
    batch = shapes.select(flat)
    stages = stage_seconds(plan, sample_seconds(plan, cost, batch), batch, local)
    slots, actions = [], []
    for rank in step.ranks:
        if rank.rank not in lines:
            continue  # another tensor-parallel shard
        if rank.actions:
            actions += [(lines[rank.rank][1], action, end - start) for action, start, end in rank.actions]
        elif len(rank.slot_end_s) == plan.num_microbatches:
            slots.append(np.diff([rank.begin_s, *rank.slot_end_s]))
    return _Run(
        groups=tuple(tuple(group) for rank in groups for group in rank),
        stages=stages,
        memory=step_memory(plan, cost.spec, batch, local),
        slot_s=np.array(slots) if len(slots) == plan.llm.dp else np.zeros((0, plan.num_microbatches)),
        actions=tuple(actions),
        sync_s=min(rank.sync_end_s - _last(rank) for rank in step.ranks),
        # ranks of a pipeline hold unlike shares of the model, and the largest decides
        optimizer_s=float((np.max if actions else np.mean)([rank.end_s - rank.sync_end_s for rank in step.ranks])),
        data_s=float(np.mean([rank.data_s for rank in step.ranks])),
        step_s=step.step_s,
    )


def _last(rank: RankStep) -> float:
    return max([*rank.slot_end_s, *(end for _, _, end in rank.actions)], default=float("nan"))


def _pairs(plan: Plan, run: _Run, kind: str, calibration: Calibration | None) -> tuple[FloatArray, FloatArray]:
    """Measured and predicted seconds of the actions of a kind."""
    forward, backward = calibrated(plan, run.stages, calibration)
    if kind == "microbatch":
        total = np.sum([*forward, *backward], axis=0) if run.slot_s.size else run.slot_s
        return run.slot_s.ravel(), np.ravel(total)
    measured, predicted = [], []
    for replica, action, seconds in run.actions:
        module = "vision" if action.stage < plan.vision.num_stages else "llm"
        if kind != f"{module} {'forward' if action.kind is Kind.FORWARD else 'backward'}":
            continue
        rows = forward if action.kind is Kind.FORWARD else backward
        share = 0.5 if action.kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) else 1.0
        guess = share * rows[action.stage][replica, action.microbatch]
        if guess > 0 and seconds > 0:
            measured.append(seconds)
            predicted.append(guess)
    return np.array(measured), np.array(predicted)


def _fit(plan: Plan, runs: Sequence[_Run], cost: CostModel) -> Calibration:
    factors: dict[str, float] = {}
    offsets: dict[str, float] = {}
    microbatch_s = 0.0
    slots = np.concatenate([run.slot_s.ravel() for run in runs])
    if slots.size and (slots > 0).all():
        vision = np.concatenate([_module(plan, run, "vision") for run in runs])
        llm = np.concatenate([_module(plan, run, "llm") for run in runs])
        by_vision, by_llm, microbatch_s = fit_relative(
            np.column_stack([vision, llm, np.ones(slots.size)]), slots
        ).tolist()
        factors = {kind: by_vision if kind.startswith("vision") else by_llm for kind in ACTION_KINDS}
    for kind in ACTION_KINDS:
        pairs = [_pairs(plan, run, kind, None) for run in runs]
        measured, predicted = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        if measured.size >= 4:
            factors[kind], offsets[kind] = fit_relative(
                np.column_stack([predicted, np.ones(measured.size)]), measured
            ).tolist()
        elif measured.size:  # too few to tell what is the same for all: a kind must not stay wrong beside fitted ones
            factors[kind] = float(fit_relative(predicted[:, None], measured)[0])
    return Calibration(
        factors=factors,
        offsets_s=offsets,
        microbatch_s=microbatch_s,
        reduce_s=_median([run.sync_s for run in runs]),
        optimizer_s=_median([run.optimizer_s for run in runs]),
        data_s=_median([run.data_s for run in runs]),
        cost_version=cost.version,
    )


def _module(plan: Plan, run: _Run, module: str) -> FloatArray:
    number = plan.vision.num_stages
    chosen = slice(0, number) if module == "vision" else slice(number, None)
    return np.ravel(np.sum([*run.stages.forward[chosen], *run.stages.backward[chosen]], axis=0))


def _play(
    plan: Plan,
    cost: CostModel,
    run: _Run,
    communication: Communication | None,
    wire_bytes: int,
    optimizer_s: float,
    calibration: Calibration | None,
) -> Timeline:
    """The recorded step, simulated: its microbatches in their order."""
    durations = step_durations(
        plan,
        cost,
        run.stages,
        communication=communication,
        wire_bytes=wire_bytes,
        optimizer_s=optimizer_s,
        calibration=calibration,
        by_pipeline=bool(run.actions),
    )
    return simulate_order(
        _order(plan, run), durations, activation_bytes=run.memory.kept, put_off_bytes=run.memory.put_off
    )


def _order(plan: Plan, run: _Run) -> Order:
    """As it ran, where actions were recorded; otherwise the plan's."""
    ranks = plan_stage_ranks(plan)
    if run.actions:
        order: Order = [[] for _ in range(max(ranks) + 1)]
        for replica, action, _ in run.actions:
            if replica == 0:
                order[ranks[action.stage]].append(action)
        return order
    return make_order(
        plan.schedule,
        stage_rank=ranks,
        num_microbatches=plan.num_microbatches,
        first_backward_stage=first_backward_stage(plan),
    )


def _tokens(plan: Plan, run: _Run) -> FloatArray:
    return most_in_flight(_order(plan, run), stage_tokens(plan, run.stages.llm_tokens, run.stages.image_tokens))


def _median(values: Sequence[float]) -> float | None:
    seen = [value for value in values if np.isfinite(value)]
    return max(0.0, float(np.median(seen))) if seen else None


def _relative(measured: FloatArray, predicted: FloatArray) -> float | None:
    usable = measured > 0
    if not usable.any():
        return None
    return float(np.median(np.abs(predicted[usable] - measured[usable]) / measured[usable]))


def _error(kind: str, measured: FloatArray, predicted: FloatArray, after: float | None) -> KindError:
    guess = float(predicted.mean())
    return KindError(
        kind=kind,
        count=int(measured.size),
        measured_s=float(measured.mean()),
        predicted_s=guess,
        ratio=float(measured.mean()) / guess if guess > 0 else None,
        error=_relative(measured, predicted),
        error_after=after,
    )
