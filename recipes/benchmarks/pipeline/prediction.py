"""Six combinations of plan and grouping: predicted beside measured seconds of a step, and where they differ.

For each combination, the simulator composes and orders the microbatches of every global batch and says what the step
will take: once from what was measured apart (costs, links, optimizer), once corrected by a recorded run of the same
plan on another global batch. Then the pipeline runs these microbatches in this order, all combinations in turn, round
after round, and writes its trace.

In: `Ingredients`. Out: rows of kind `pipeline`, one per combination, batch and round, and of kind `action`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_dflop.cost import CostModel
from hf_dflop.pipeline import PipelineModel, PipelineTrace, StepBatch
from hf_dflop.plan import Calibration, Plan
from hf_dflop.plan.compare_run import Comparison, compare_run
from hf_dflop.plan.recorded import recorded_steps
from hf_dflop.plan.simulate import simulate_order
from hf_dflop.plan.stage_seconds import sample_seconds, stage_seconds
from hf_dflop.plan.step import PlannedStep, plan_step, step_durations
from recipes.benchmarks.common.results import Row
from recipes.benchmarks.pipeline.costs import Links, measure_optimizer
from recipes.benchmarks.pipeline.ingredients import Ingredients, say, slowest
from recipes.benchmarks.pipeline.settings import GROUPINGS, PLANS, make_plan

__all__ = ["predict_and_run"]

WIRE_BYTES = 4
LOSS_TOLERANCE = 1e-4


class Combination:
    """A plan with a grouping, on a pipeline that it shares with the other grouping."""

    def __init__(
        self,
        name: str,
        grouping: str,
        plan: Plan,
        pipe: PipelineModel,
        optimizer: Any,
        optimizer_s: list[float],
        folder: Path,
    ) -> None:
        self.name, self.grouping, self.plan = name, grouping, plan
        self.pipe, self.optimizer, self.optimizer_s, self.folder = pipe, optimizer, optimizer_s, folder
        self.planned: list[PlannedStep] = []
        self.inputs: list[StepBatch] = []
        self.predicted_s: list[float] = []
        self.calibrated_s: list[float] = []

    @property
    def label(self) -> str:
        return f"{self.name}, {self.grouping}"

    def step(
        self, batch: StepBatch, planned: PlannedStep, trace: PipelineTrace | None = None, number: int | None = None
    ) -> float:
        """One optimizer step at learning rate 0; returns the loss."""
        result = self.pipe.step(batch, order=planned.order)
        self.pipe.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if trace is not None:
            trace.end_step(batch, step=number)
        return result.loss

    def plan_batch(
        self, ingredients: Ingredients, batch: Any, cost: CostModel, links: Links, calibration: Calibration | None
    ) -> tuple[PlannedStep, float]:
        """Composition, order and predicted seconds of a global batch."""
        optimizer_s: Any = self.optimizer_s if self.name != "DP 2" else max(self.optimizer_s)
        planned = plan_step(
            self.plan,
            cost,
            ingredients.shapes.select(batch),
            communication=links,
            wire_bytes=WIRE_BYTES,
            optimizer_s=optimizer_s,
            calibration=calibration,
        )
        return planned, simulate_order(planned.order, planned.durations).step_s


def _combinations(ingredients: Ingredients, folder: Path) -> list[Combination]:
    found = []
    for name in PLANS:
        plans = {grouping: _plan(ingredients, name, balance=balance) for grouping, balance in GROUPINGS.items()}
        pipe = PipelineModel.from_model(ingredients.model(), plan=plans["stock"])
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        optimizer_s = measure_optimizer(pipe, optimizer)
        found += [
            Combination(
                name, grouping, plan, pipe, optimizer, optimizer_s, folder / f"{name}-{grouping}".replace(" ", "")
            )
            for grouping, plan in plans.items()
        ]
    return found


def _plan(ingredients: Ingredients, name: str, *, balance: bool) -> Plan:
    spec = ingredients.spec
    return make_plan(
        name,
        ingredients.settings,
        vision_layers=spec.vision.num_layers,
        llm_layers=spec.llm.num_layers,
        balance=balance,
    )


def predict_and_run(ingredients: Ingredients, cost: CostModel, links: Links, folder: Path) -> list[Row]:
    """Predict, run and compare the six combinations."""
    settings = ingredients.settings
    combinations = _combinations(ingredients, folder)
    calibrations = [_calibrate(combination, ingredients, cost, links) for combination in combinations]
    for combination, calibration in zip(combinations, calibrations, strict=True):
        for batch in ingredients.batches:
            planned, predicted_s = combination.plan_batch(ingredients, batch, cost, links, None)
            combination.planned.append(planned)
            combination.predicted_s.append(predicted_s)
            combination.calibrated_s.append(_again(combination, planned, ingredients, batch, cost, links, calibration))
            combination.inputs.append(ingredients.inputs(combination.pipe, batch, planned.groups))
        combination.step(combination.inputs[0], combination.planned[0])
    rows: list[Row] = []
    losses: dict[int, float] = {}
    for round_ in range(settings.num_rounds):
        turn = combinations[round_ % len(combinations) :] + combinations[: round_ % len(combinations)]
        for combination in turn if round_ % 2 == 0 else turn[::-1]:
            trace = PipelineTrace(combination.pipe, combination.folder / "measured", resume=round_ > 0)
            for b in range(settings.num_batches):
                number = round_ * settings.num_batches + b
                step = partial(combination.step, combination.inputs[b], combination.planned[b], trace, number)
                seconds, loss = slowest(step)
                if abs(loss / losses.setdefault(b, loss) - 1) > LOSS_TOLERANCE:
                    raise RuntimeError(f"{combination.label}: loss {loss}, others have {losses[b]} on the same batch")
                rows.append(
                    {
                        "kind": "pipeline",
                        "mix": "documents",
                        "arm": combination.label,
                        "plan": combination.name,
                        "grouping": combination.grouping,
                        "round": round_,
                        "batch": b,
                        "seconds": seconds,
                        "predicted_s": combination.predicted_s[b],
                        "calibrated_s": combination.calibrated_s[b],
                    }
                )
            trace.close()
            say(f"round {round_ + 1}, {combination.label}: {seconds:.2f} s")
    dist.barrier()
    for combination, calibration in zip(combinations, calibrations, strict=True):
        rows += _actions(combination, ingredients, cost, links, calibration)
    return rows


def _calibrate(combination: Combination, ingredients: Ingredients, cost: CostModel, links: Links) -> Calibration:
    """From a recorded run on the global batch that is not measured afterwards."""
    batch = ingredients.calibration
    planned, _ = combination.plan_batch(ingredients, batch, cost, links, None)
    inputs = ingredients.inputs(combination.pipe, batch, planned.groups)
    with PipelineTrace(combination.pipe, combination.folder / "calibration") as trace:
        for _ in range(ingredients.settings.calibration_steps + 1):
            combination.step(inputs, planned, trace)
    dist.barrier()
    return _compare(combination, "calibration", ingredients, cost, links, None).calibration


def _compare(
    combination: Combination,
    run: str,
    ingredients: Ingredients,
    cost: CostModel,
    links: Links,
    calibration: Calibration | None,
) -> Comparison:
    return compare_run(
        combination.plan,
        recorded_steps(combination.folder / run, skip_steps=1 if run == "calibration" else 0),
        ingredients.shapes,
        cost,
        communication=links,
        wire_bytes=WIRE_BYTES,
        optimizer_s=max(combination.optimizer_s),
        calibration=calibration,
    )


def _again(
    combination: Combination,
    planned: PlannedStep,
    ingredients: Ingredients,
    batch: Any,
    cost: CostModel,
    links: Links,
    calibration: Calibration,
) -> float:
    """The calibrated prediction of the very composition and order that will run."""
    plan, shapes = combination.plan, ingredients.shapes.select(batch)
    stages = stage_seconds(plan, sample_seconds(plan, cost, shapes), shapes, planned.groups)
    durations = step_durations(plan, cost, stages, communication=links, wire_bytes=WIRE_BYTES, calibration=calibration)
    return simulate_order(planned.order, durations).step_s


def _actions(
    combination: Combination, ingredients: Ingredients, cost: CostModel, links: Links, calibration: Calibration
) -> list[Row]:
    """Errors by kind of action in the measured steps, without and with the calibration."""
    plain = _compare(combination, "measured", ingredients, cost, links, None)
    corrected = _compare(combination, "measured", ingredients, cost, links, calibration)
    return [
        {
            "kind": "action",
            "arm": combination.label,
            "action": before.kind,
            "count": before.count,
            "measured_s": before.measured_s,
            "predicted_s": before.predicted_s,
            "calibrated_s": after.predicted_s,
            "error": before.error,
            "calibrated_error": after.error,
        }
        for before, after in zip(plain.kinds, corrected.kinds, strict=True)
    ]
