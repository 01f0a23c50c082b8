"""Bytes that each rank holds at most in a step, against what the planner foresees. Arguments: names of cases.

Counted are parameters, optimizer state, and all that operators make while a step runs: activations, gradients,
buffers of what is received and sent. With zero bubble, torch's split backward also keeps gradients of activations
from one part to the other.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlavaForConditionalGeneration

from hf_dflop.cost import MemorySettings, ModelSpec
from hf_dflop.integrations.pipeline_data import Slot, SlotRows, join_slots
from hf_dflop.pipeline import PipelineModel, StepBatch
from hf_dflop.plan import Durations, ModulePlan, Plan, simulate_order
from hf_dflop.plan.step_memory import step_memory
from hf_dflop.profile.measure_time import AllocationCounter
from tests.distributed import pipelines, tiny
from tests.distributed.every_case import EVERY_CASE

LIMIT = 1.1
LAYERS = 4
SIZE = 4
"""Samples of a microbatch."""
CASES: dict[str, dict[str, Any]] = {
    "encoder | LLM | LLM": {"llm": ModulePlan(layers=(2, 2))},
    "encoder | LLM x 2": {"llm": ModulePlan(layers=(4,), dp=2)},
    "encoder x 2 | LLM": {"vision": ModulePlan(layers=(4,), dp=2)},
    "encoder | encoder | LLM": {"vision": ModulePlan(layers=(2, 2))},
    "colocated": {"llm": ModulePlan(layers=(2, 1, 1)), "placement": "colocated"},
    "encoder | LLM | LLM, zero bubble": {"llm": ModulePlan(layers=(2, 2)), "schedule": "zero-bubble"},
    "encoder | LLM x 2, zero bubble": {"llm": ModulePlan(layers=(4,), dp=2), "schedule": "zero-bubble"},
    "encoder | encoder | LLM, zero bubble": {"vision": ModulePlan(layers=(2, 2)), "schedule": "zero-bubble"},
    "colocated, zero bubble": {
        "llm": ModulePlan(layers=(2, 1, 1)),
        "placement": "colocated",
        "schedule": "zero-bubble",
    },
}


COVERED = ("encoder | LLM x 2, zero bubble", "encoder | encoder | LLM, zero bubble")
"""Cases whose conditions are in others; run with every case."""


def model() -> LlavaForConditionalGeneration:
    """So wide that tables of positions and masks weigh little beside activations."""
    config = tiny.model().config
    for part, hidden in ((config.vision_config, 64), (config.text_config, 96)):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = hidden, 2 * hidden, LAYERS
    config.text_config.head_dim = 24
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def collate(rows: Any) -> Any:
    batch = tiny.Collate()(rows)
    del batch["sample_ids"]
    return batch


def batch_of(pipe: PipelineModel, dataset: Any, shapes: Any, groups: list[list[list[int]]]) -> StepBatch:
    tokens = int(shapes.label_tokens.sum())
    rows = SlotRows(dataset, shapes, collate, pipe.topology, pipe.place.rank)
    slots = [Slot(samples=tuple(map(tuple, slot)), label_tokens=tokens) for slot in zip(*groups, strict=True)]
    return join_slots([rows[slot] for slot in slots])


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def foreseen(pipe: PipelineModel, shapes: Any, groups: list[list[list[int]]]) -> float:
    plan = pipe.plan
    spec = ModelSpec.from_config(pipe.config)
    memory = step_memory(plan, spec, shapes, groups, MemorySettings(dtype="float32"))
    seconds = [[[1.0] * plan.num_microbatches] * pipe.topology.replicas(s) for s in range(pipe.topology.num_stages)]
    order = pipe.order_for(plan.num_microbatches)
    timeline = simulate_order(
        order, Durations.of(seconds, seconds), activation_bytes=memory.kept, put_off_bytes=memory.put_off
    )
    peaks = dict(zip(timeline.lines, memory.peak_bytes(timeline), strict=True))
    return float(peaks[pipe.place.column, pipe.place.replica])


def run(name: str, settings: dict[str, Any]) -> None:
    plan = Plan(
        **({"vision": ModulePlan(layers=(LAYERS,)), "llm": ModulePlan(layers=(LAYERS,)), "padded": True} | settings),
        num_microbatches=6,
    )
    dataset, shapes = tiny.rows(plan.llm.dp * plan.num_microbatches * SIZE, text_only=False)
    order = iter(range(len(shapes)))
    groups = [[[next(order) for _ in range(SIZE)] for _ in range(plan.num_microbatches)] for _ in range(plan.llm.dp)]
    pipe = PipelineModel.from_model(model(), plan=plan, check=False)
    optimizer = torch.optim.AdamW(pipe.parameters())
    batch = batch_of(pipe, dataset, shapes, groups)
    for counter in (None, AllocationCounter()):
        if counter is None:
            pipe.step(batch)
        else:
            with counter:
                pipe.step(batch)
                pipe.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert counter is not None
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    held = num_bytes(pipe.parameters()) + num_bytes(state)
    allowed = foreseen(pipe, shapes, groups)
    found: list[Any] = [None] * plan.num_ranks
    dist.all_gather_object(found, (held, counter.peak_bytes, allowed))
    ratios = [(held + peak) / allowed for held, peak, allowed in found]
    if pipe.place.rank == 0:
        figures = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        activations = ", ".join(f"{peak / (held + peak):.0%}" for held, peak, _ in found)
        print(f"memory: {name}: {figures} of what was foreseen; made in the step: {activations}", flush=True)
    assert max(ratios) <= LIMIT, (name, ratios)


if __name__ == "__main__":
    worlds = pipelines.Worlds()
    for name, settings in CASES.items():
        if name in sys.argv[1:] or (len(sys.argv) < 2 and (EVERY_CASE or name not in COVERED)):
            with worlds.of(3) as inside:
                assert inside
                run(name, settings)
