"""Six combinations of plan and grouping: predicted beside measured seconds of a step, and where they differ.

For each combination, the simulator composes and orders the microbatches of every global batch. The pipeline runs these
microbatches in this order, all combinations in turn, round after round, and writes its trace; before each round single
microbatches are measured again. From these (and links and optimizer, measured once) the simulator says what the steps
take. One global batch more runs beside the others: to its trace the correction is fitted, with which the others are
predicted a second time.

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
from recipes.benchmarks.pipeline.costs import Costs, Links, measure_optimizer
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
        # of the batch for the calibration, then of those that are measured
        self.planned: list[PlannedStep] = []
        self.inputs: list[StepBatch] = []

    @property
    def label(self) -> str:
        return f"{self.name}, {self.grouping}"

    def step(self, batch: int, trace: PipelineTrace | None = None, number: int | None = None) -> float:
        """One optimizer step at learning rate 0; returns the loss."""
        result = self.pipe.step(self.inputs[batch], order=self.planned[batch].order)
        self.pipe.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if trace is not None:
            trace.end_step(self.inputs[batch], step=number)
        return result.loss

    def predict(
        self, batch: int, ingredients: Ingredients, cost: CostModel, links: Links, calibration: Calibration | None
    ) -> float:
        """Predicted seconds of the very composition and order that ran."""
        optimizer_s: Any = self.optimizer_s if self.name != "DP 2" else max(self.optimizer_s)
        shapes = ingredients.shapes.select([ingredients.calibration, *ingredients.batches][batch])
        planned = self.planned[batch]
        stages = stage_seconds(self.plan, sample_seconds(self.plan, cost, shapes), shapes, planned.groups)
        durations = step_durations(
            self.plan,
            cost,
            stages,
            communication=links,
            wire_bytes=WIRE_BYTES,
            optimizer_s=optimizer_s,
            calibration=calibration,
            by_pipeline=True,  # "DP 2" too
        )
        return simulate_order(planned.order, durations).step_s


def _combinations(ingredients: Ingredients, folder: Path) -> list[Combination]:
    found = []
    for name in PLANS:
        plans = {grouping: _plan(ingredients, name, balance=balance) for grouping, balance in GROUPINGS.items()}
        pipe = PipelineModel.from_model(ingredients.model(), plan=plans["stock"])
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        optimizer_s = measure_optimizer(pipe, optimizer)
        found += [
            Combination(
                name,
                grouping,
                plan,
                pipe,
                optimizer,
                optimizer_s,
                folder / f"{name}-{grouping}".replace(" / ", "-").replace(" ", ""),
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


def predict_and_run(ingredients: Ingredients, costs: Costs, links: Links, folder: Path) -> list[Row]:
    """Compose, run, predict and compare the six combinations."""
    settings = ingredients.settings
    cost = costs.fitted()
    combinations = _combinations(ingredients, folder)
    for combination in combinations:
        for batch in (ingredients.calibration, *ingredients.batches):
            shapes = ingredients.shapes.select(batch)
            planned = plan_step(
                combination.plan, cost, shapes, communication=links, wire_bytes=WIRE_BYTES, by_pipeline=True
            )
            combination.planned.append(planned)
            combination.inputs.append(ingredients.inputs(combination.pipe, batch, planned.groups))
        combination.step(0)
    measured: list[Row] = []
    losses: dict[int, float] = {}
    for round_ in range(settings.num_rounds):
        costs.look()
        turn = combinations[round_ % len(combinations) :] + combinations[: round_ % len(combinations)]
        for combination in turn if round_ % 2 == 0 else turn[::-1]:
            for b in range(settings.num_batches + 1):
                run = "measured" if b else "calibration"
                with PipelineTrace(combination.pipe, combination.folder / run, resume=round_ > 0 or b > 1) as trace:
                    seconds, loss = slowest(partial(combination.step, b, trace, round_ * settings.num_batches + b))
                if abs(loss / losses.setdefault(b, loss) - 1) > LOSS_TOLERANCE:
                    raise RuntimeError(f"{combination.label}: loss {loss}, others have {losses[b]} on the same batch")
                if b:
                    measured.append({"arm": combination.label, "round": round_, "batch": b - 1, "seconds": seconds})
            say(f"round {round_ + 1}, {combination.label}: {seconds:.2f} s")
    dist.barrier()
    cost = costs.fitted()
    rows: list[Row] = []
    for combination in combinations:
        calibration = _compare(combination, "calibration", ingredients, cost, links, None).calibration
        batches = range(settings.num_batches + 1)
        first = [combination.predict(b, ingredients, cost, links, None) for b in batches]
        again = [combination.predict(b, ingredients, cost, links, calibration) for b in batches]
        for row in measured:
            if row["arm"] == combination.label:
                guesses = {
                    "predicted_s": first[row["batch"] + 1],
                    "calibrated_s": again[row["batch"] + 1],
                }
                names = {"plan": combination.name, "grouping": combination.grouping}
                rows.append({"kind": "pipeline", "mix": "documents", **row, **names, **guesses})
        rows += _actions(combination, ingredients, cost, links, calibration)
    return rows


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
        recorded_steps(combination.folder / run, skip_steps=0),
        ingredients.shapes,
        cost,
        communication=links,
        wire_bytes=WIRE_BYTES,
        optimizer_s=max(combination.optimizer_s),
        calibration=calibration,
    )


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
