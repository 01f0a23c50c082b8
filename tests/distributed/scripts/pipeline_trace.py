"""What two processes really ran, as the trace tells it. Argument: a folder.

Trainer on (encoder | LLM), two calls a step; a hand-written loop on (encoder with LLM stage | LLM stage), zero bubble;
two replicas. In each: every action of the order once and in its order, nothing overlaps within a rank, waits are there
where an input comes from another rank, an action follows what it needs on the other rank.
"""

import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.pipeline import PipelineModel, PipelineTrace
from hf_dflop.plan.actions import Action, Kind
from hf_dflop.plan.compare_run import compare_run
from hf_dflop.plan.recorded import RankStep, RecordedStep, recorded_steps
from hf_dflop.shapes import Shapes
from tests.distributed import pipelines
from tests.distributed.ingredients import ingredients
from tests.distributed.scripts import pipeline_trainer

SLEEP_S = 0.25
TICK_S = 1e-4
"""Moments are floats of seconds since 1970, good to a microsecond; both ranks read one clock."""


def spans(rank: RankStep) -> list[tuple[float, float]]:
    found = [(begin, end) for list_ in (rank.actions, rank.waits, rank.sends) for _, begin, end in list_]
    return sorted(found + ([rank.sum_s] if rank.sum_s is not None else []))


def check_structure(step: RecordedStep, expected: list[list[Action]], columns: tuple[int, ...]) -> None:
    """`expected`: of each rank, the actions in their order; `columns`: of each stage."""
    ended: dict[Action, float] = {}
    waited: dict[Action, float] = {}
    for rank, actions in zip(step.ranks, expected, strict=True):
        assert [action for action, _, _ in rank.actions] == actions, (rank.rank, rank.actions)
        edges = [(rank.begin_s - rank.data_s, rank.begin_s), *spans(rank), (rank.sync_end_s, rank.end_s)]
        assert all(begin <= end for begin, end in edges), edges
        assert all(end <= begin + TICK_S for (_, end), (begin, _) in pairwise(edges)), edges
        before = {action: (begin, end) for action, begin, end in rank.waits}
        assert len(before) == len(rank.waits)
        begun = {action: begin for action, begin, _ in rank.actions}
        assert all(abs(begun[action] - end) < TICK_S for action, (_, end) in before.items())
        ended |= {action: end for action, _, end in rank.actions}
        waited |= {action: begun[action] for action in before}
    assert bool(waited) == (len(set(columns)) > 1)
    for action, begin in waited.items():
        assert all(ended.get(source, begin) <= begin + TICK_S for source in needed(action)), action


def needed(action: Action) -> list[Action]:
    if action.kind is Kind.FORWARD:
        return [Action(action.stage - 1, Kind.FORWARD, action.microbatch)]
    if action.kind is Kind.BACKWARD_WEIGHT:
        return []
    return [Action(action.stage + 1, kind, action.microbatch) for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)]


def trainer(folder: Path) -> None:
    """(encoder | LLM), two calls a step; the second step's encoder is held up."""
    built = pipeline_trainer.make_trainer(
        pipeline_trainer.Case.parse("llava:1,1,1"),
        pipeline_trainer.arguments(folder / "trainer", max_steps=3, eval_strategy="steps", eval_steps=2),
        torch.float32,
        trace_dir=folder / "trainer",
    )
    pipe = built.pipe
    with Delayed(pipe, lambda: built.state.global_step == 1):
        built.train()
    dist.barrier()
    steps = recorded_steps(folder / "trainer", skip_steps=0)
    assert [step.step for step in steps] == [1, 2, 3]
    order = pipe.order_for(pipe.plan.num_microbatches)
    twice = [
        [replace(a, microbatch=a.microbatch + call * pipe.plan.num_microbatches) for call in (0, 1) for a in line]
        for line in order
    ]
    for step in steps:
        check_structure(step, twice, pipe.topology.stage_columns)
        encoder, llm = step.ranks
        assert len(llm.samples) == len(encoder.samples) == 2 * pipe.plan.num_microbatches
        assert all(set(some) <= set(all_) for some, all_ in zip(encoder.samples, llm.samples, strict=True))
    assert {i for step in steps for group in step.ranks[1].samples for i in group} <= set(range(27))
    slow, usual = steps[1], steps[2]
    waited = [sum(end - begin for _, begin, end in step.ranks[1].waits) for step in (slow, usual)]
    computed = [max(end - begin for _, begin, end in step.ranks[0].actions) for step in (slow, usual)]
    assert computed[0] > SLEEP_S > 2 * computed[1], computed
    assert waited[0] > SLEEP_S > 2 * waited[1], waited


class Delayed:
    """Holds up the encoder's first forward of a call while `when` says so."""

    def __init__(self, pipe: PipelineModel, when: Any) -> None:
        self._stages = [stage for stage in pipe._stages if stage.is_vision]
        self._when = when

    def __enter__(self) -> None:
        for stage in self._stages:
            compute = stage._compute

            def slowly(microbatch: int, received: Any, compute: Any = compute) -> Any:
                if microbatch == 0 and self._when():
                    time.sleep(SLEEP_S)
                return compute(microbatch, received)

            stage._compute = slowly  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        for stage in self._stages:
            del stage._compute


def loop(folder: Path, name: str, plan: Any) -> None:
    """A hand-written loop; what it wrote is compared with the simulation of the very plan."""
    cells = pipelines.cells_of("llava")
    dealt = pipelines.deal(cells, plan.llm.dp)
    collate = pipelines.collator("llava")
    shape = pipelines.shape_of("llava", dealt, collate)
    model = pipelines.model("llava", torch.float32)
    spec = ModelSpec.from_config(model.config)
    pipe = PipelineModel.from_model(model, plan=plan, check=False)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=1e-6)
    numbers = iter(range(100))
    samples = tuple(tuple(tuple(next(numbers) for _ in rows) for rows in replicas) for replicas in dealt)
    batch = replace(pipelines.batch_of(pipe, dealt, shape, collate), samples=samples)
    with PipelineTrace(pipe, folder / name) as trace:
        for _ in range(3):
            pipe.step(batch, backward=False)
            pipe.step(batch)
            optimizer.step()
            optimizer.zero_grad()
            trace.end_step(batch)
    pipe.step(batch)  # not recorded
    dist.barrier()
    steps = recorded_steps(folder / name, skip_steps=0)
    order = pipe.order_for(plan.num_microbatches)
    expected = [order[pipe.topology.place(rank).column] for rank in range(2)]
    for step in steps:
        check_structure(step, expected, pipe.topology.stage_columns)
        assert all(rank.sum_s is not None for rank in step.ranks)
        assert [rank.samples for rank in step.ranks] == [
            tuple(replicas[pipe.topology.place(rank).replica] for replicas in samples) for rank in range(2)
        ]
    assert len(steps) == 3
    shapes = [s for replicas in shape.microbatches for s in replicas]
    tokens = [n for s in shapes for n in [s.length] * len(s.features)]
    images = [n for s in shapes for n in s.features]
    found = compare_run(plan, steps, _shapes(tokens, images), CostModel.analytic(spec))
    kinds = {kind.kind: kind.count for kind in found.kinds}
    assert kinds["llm forward"] == 3 * sum(s.rows > 0 for s in shapes) * plan.llm.num_stages, kinds
    assert kinds["step"] == 3


def _shapes(tokens: list[int], images: list[int]) -> Shapes:
    zero = [0] * len(tokens)
    return Shapes(
        num_images=[int(n > 0) for n in images],
        image_tiles=[int(n > 0) for n in images],
        image_patches=images,
        image_patches_sq=[n * n for n in images],
        image_tokens=images,
        text_tokens=[t - n for t, n in zip(tokens, images, strict=True)],
        label_tokens=zero,
    )


def prepare() -> None:
    ingredients(torch.float32)
    pipelines.prepare("llava", dtype=torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    trainer(where)
    loop(
        where,
        "colocated",
        pipelines.plan((1, 2, 1), placement="colocated", num_microbatches=8, schedule="zero-bubble", padded=True),
    )
    loop(where, "replicas", pipelines.plan((2, 1, 2), placement="replicated", num_microbatches=4, padded=True))
    if dist.get_rank() == 0:
        print("trace: whole", flush=True)
    dist.destroy_process_group()
