"""The same work through torch's own pipeline, through ours, under DDP and FSDP2.

torch's engine wants microbatches of one shape: here that is the longest of the steps, in tokens and in tiles. It runs
the very modules that ours runs as stages, so that engines differ and nothing else does.

In: `Ingredients`. Out: rows of kind `engine` (one shape for all) and `padding` (the data as it is).
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from hf_dflop.cost import CostModel
from hf_dflop.pipeline import MicrobatchShape, PipelineModel, PipelineTrace, StepBatch, StepShape
from hf_dflop.pipeline.features import read_format
from hf_dflop.pipeline.split import build_part
from hf_dflop.pipeline.structure import read_structure
from hf_dflop.plan.actions import Order
from hf_dflop.plan.choose_order import choose_order
from hf_dflop.plan.orders import make_order
from hf_dflop.plan.stage_seconds import sample_seconds, stage_seconds
from hf_dflop.plan.step import compose_microbatches, plan_stage_ranks, step_durations, stock_groups
from recipes.benchmarks.common.results import Row
from recipes.benchmarks.pipeline.costs import Links
from recipes.benchmarks.pipeline.ingredients import Ingredients, say, slowest
from recipes.benchmarks.pipeline.settings import ENGINE_ARMS, PADDING_ARMS, make_plan
from recipes.benchmarks.pipeline.torch_stages import TorchLlm, TorchVision

__all__ = ["compare_engines", "compare_padding"]

LOSS_TOLERANCE = 1e-4
Run = Callable[[], float]
"""Forward and backward of a step; gives its loss on every process, or NaN where only the last one knows it."""


class TorchPipeline:
    """torch's `Schedule1F1B` over (encoder / LLM), with static shapes."""

    def __init__(self, ingredients: Ingredients, num_microbatches: int, length: int, tiles: int) -> None:
        self.length, self.tiles, self.count = length, tiles, num_microbatches
        model = ingredients.model()
        structure = read_structure(model)
        plan = make_plan(
            "vision / LLM",
            ingredients.settings,
            vision_layers=ingredients.spec.vision.num_layers,
            llm_layers=ingredients.spec.llm.num_layers,
            balance=False,
        )
        vision = build_part(model, structure, plan, 0)
        self.pad_id = int(ingredients.collator.processor.tokenizer.pad_token_id)
        self.ingredients = ingredients
        row = next(i for i in range(len(ingredients.rows)) if ingredients.shapes.image_tokens[i])
        pixels = ingredients.collator([ingredients.rows[row]])["pixel_values"]
        with torch.no_grad():
            form = read_format(vision.encode({"pixel_values": pixels[:1]})["image"])
        rank = dist.get_rank()
        module = TorchVision(vision, form) if rank == 0 else TorchLlm(build_part(model, structure, plan, 1), form)
        self.module = module
        stage = PipelineStage(module, rank, 2, torch.device("cpu"))
        self.schedule = Schedule1F1B(
            stage, num_microbatches, loss_fn=lambda output, target: output.sum(), scale_grads=False
        )

    def inputs(self, groups: list[list[int]], label_tokens: int) -> dict[str, torch.Tensor]:
        """The step's inputs of this process, every microbatch of one shape."""
        parts = [self.ingredients.collator([self.ingredients.rows[i] for i in group]) for group in groups]
        if dist.get_rank() == 0:
            size = parts[0]["pixel_values"].shape[1:] if "pixel_values" in parts[0] else None
            size = size or next(part["pixel_values"].shape[1:] for part in parts if "pixel_values" in part)
            pixels = torch.zeros((len(parts), self.tiles, *size))
            for m, part in enumerate(parts):
                if "pixel_values" in part:
                    pixels[m, : len(part["pixel_values"])] = part["pixel_values"]
            return {"pixel_values": pixels.flatten(0, 1)}
        shapes = self.ingredients.shapes
        counts = [int(sum(shapes.image_tokens[i] for i in group)) for group in groups]
        found = {
            key: torch.cat(
                [nn.functional.pad(part[key], (0, self.length - part[key].shape[1]), value=fill) for part in parts]
            )
            for key, fill in (("input_ids", self.pad_id), ("attention_mask", 0), ("labels", -100))
        }
        return found | {
            "num_features": torch.tensor(counts),
            "divisor": torch.full((len(groups),), label_tokens),
        }

    def run(self, inputs: dict[str, torch.Tensor]) -> float:
        self.module.zero_grad(set_to_none=True)
        if dist.get_rank() == 0:
            self.schedule.step(inputs["pixel_values"], return_outputs=False)
            return float("nan")
        losses: list[torch.Tensor] = []
        self.schedule.step(target=inputs["labels"], losses=losses, return_outputs=False, **inputs)
        return float(sum(loss.detach().sum() for loss in losses))


def _ours(pipe: PipelineModel, batch: StepBatch, order: Order) -> float:
    for parameter in pipe.parameters():
        parameter.grad = None
    return pipe.step(batch, order=order).loss


def compare_engines(ingredients: Ingredients, folder: Path) -> list[Row]:
    """The same microbatch again and again: what the engine itself takes."""
    settings, shapes = ingredients.settings, ingredients.shapes
    with_image = np.flatnonzero(shapes.image_tokens)
    picked = with_image[np.argsort(shapes.llm_tokens[with_image])]
    middle = max(0, len(picked) // 2 - settings.microbatch_samples // 2)
    group = [int(i) for i in picked[middle : middle + settings.microbatch_samples]]
    count = settings.num_microbatches
    tokens = count * ingredients.label_tokens(np.array(group))
    length, tiles = int(shapes.llm_tokens[group].max()), int(shapes.image_tiles[group].sum())
    theirs = TorchPipeline(ingredients, count, length, tiles)
    given = theirs.inputs([group] * count, tokens)
    pipe, order = _pipe(ingredients, "1f1b")
    inputs = ingredients.inputs(pipe, np.arange(len(shapes)), [[group for _ in range(count)]])
    inputs = replace(inputs, shape=replace(inputs.shape, label_tokens=tokens))
    arms: dict[str, Run] = {
        "torch": partial(theirs.run, given),
        "hf_dflop": partial(_ours, pipe, inputs, order),
        "hf_dflop traced": partial(_ours, pipe, inputs, order),
    }
    assert list(arms) == list(ENGINE_ARMS)
    for run in (arms["torch"], arms["hf_dflop"]):
        for _ in range(2):
            run()
    rows: list[Row] = []
    losses: list[float] = []
    for round_ in range(settings.engine_rounds):
        names = list(arms)[round_ % 3 :] + list(arms)[: round_ % 3]
        for name in names:
            with contextlib.ExitStack() as stack:
                if name == "hf_dflop traced":
                    stack.enter_context(PipelineTrace(pipe, folder / "engine", resume=round_ > 0))
                seconds, loss = slowest(arms[name])
            losses.append(_told(loss))
            rows.append({"kind": "engine", "arm": name, "round": round_, "seconds": seconds})
        say(f"engines, round {round_ + 1}: " + ", ".join(f"{r['arm']} {r['seconds']:.2f} s" for r in rows[-3:]))
    _same(losses, "engines")
    return rows


def _told(loss: float) -> float:
    """The last process's."""
    told = torch.tensor(loss, dtype=torch.float64)
    dist.broadcast(told, src=1)
    return float(told)


def _same(losses: list[float], what: str) -> None:
    if max(abs(loss / losses[0] - 1) for loss in losses) > LOSS_TOLERANCE:
        raise RuntimeError(f"{what}: the arms have the losses {losses} on the same samples")


def _pipe(ingredients: Ingredients, schedule: str) -> tuple[PipelineModel, Order]:
    plan = make_plan(
        "vision / LLM",
        ingredients.settings,
        vision_layers=ingredients.spec.vision.num_layers,
        llm_layers=ingredients.spec.llm.num_layers,
        balance=False,
        schedule=schedule,
    )
    pipe = PipelineModel.from_model(ingredients.model(), plan=plan)
    return pipe, pipe.order_for(plan.num_microbatches)


def compare_padding(ingredients: Ingredients, cost: CostModel, links: Links) -> list[Row]:
    """The demo's data under every arm of `PADDING_ARMS`."""
    settings, shapes = ingredients.settings, ingredients.shapes
    count = settings.num_microbatches
    dealt = [
        [part.tolist() for part in stock_groups(settings.batch_samples, 1, count)[0]] for _ in ingredients.batches
    ]
    real = [
        [[int(batch[i]) for i in part] for part in parts]
        for batch, parts in zip(ingredients.batches, dealt, strict=True)
    ]
    length = max(int(shapes.llm_tokens[group].max()) for groups in real for group in groups)
    tiles = max(int(shapes.image_tiles[group].sum()) for groups in real for group in groups)
    theirs = TorchPipeline(ingredients, count, length, tiles)
    pipe, _ = _pipe(ingredients, "1f1b")
    runs: dict[str, list[Run]] = {name: [] for name in PADDING_ARMS}
    computed: dict[str, list[tuple[int, int]]] = {name: [] for name in PADDING_ARMS}
    parallel = {"DDP": _ddp(ingredients), "FSDP2": _fsdp(ingredients)}
    for b, batch in enumerate(ingredients.batches):
        tokens = ingredients.label_tokens(batch)
        runs["torch padded"].append(partial(theirs.run, theirs.inputs(real[b], tokens)))
        computed["torch padded"].append((count * settings.microbatch_samples * length, count * tiles))
        for grouping in ("stock", "balanced"):
            for schedule in ("1f1b", "zero-bubble", "data-aware"):
                groups, order = _arm(ingredients, cost, links, pipe, batch, grouping, schedule)
                inputs = ingredients.inputs(pipe, batch, groups)
                name = f"{grouping} {schedule}"
                runs[name].append(partial(_ours, pipe, inputs, order))
                computed[name].append(_computed(inputs.shape, shapes, batch))
        for name, model in parallel.items():
            microbatches = stock_groups(settings.batch_samples, 2, count // 2)[dist.get_rank()]
            parts = [ingredients.collator([ingredients.rows[int(batch[i])] for i in part]) for part in microbatches]
            runs[name].append(partial(_replica_step, model, parts, tokens))
            padded = sum(part["input_ids"].numel() for part in parts)
            computed[name].append((_sum(padded), int(shapes.image_tiles[batch].sum())))
    rows: list[Row] = []
    losses: list[list[float]] = [[] for _ in ingredients.batches]
    for name in runs:
        runs[name][0]()  # warm up
    names = list(runs)
    for round_ in range(settings.num_rounds):
        start = round_ * len(names) // settings.num_rounds
        turn = names[start:] + names[:start]
        for name in turn if round_ % 2 == 0 else turn[::-1]:
            for b, run in enumerate(runs[name]):
                seconds, loss = slowest(run)
                losses[b].append(_told(loss))
                rows.append(
                    {
                        "kind": "padding",
                        "mix": "documents",
                        "arm": name,
                        "round": round_,
                        "batch": b,
                        "seconds": seconds,
                        "tokens": computed[name][b][0],
                        "tiles": computed[name][b][1],
                    }
                )
            say(f"padding, round {round_ + 1}, {name}: {seconds:.2f} s")
    for b, found in enumerate(losses):
        _same(found, f"padding, batch {b}")
    return rows


def _sum(value: int) -> int:
    told = torch.tensor(value)
    dist.all_reduce(told)
    return int(told)


def _computed(shape: StepShape, shapes: Any, batch: np.ndarray) -> tuple[int, int]:
    """Token positions, with padding, and tiles of a step."""
    parts: list[MicrobatchShape] = [part for replicas in shape.microbatches for part in replicas]
    return sum(part.num_tokens for part in parts), int(shapes.image_tiles[batch].sum())


def _arm(
    ingredients: Ingredients,
    cost: CostModel,
    links: Links,
    pipe: PipelineModel,
    batch: np.ndarray,
    grouping: str,
    schedule: str,
) -> tuple[Any, Order]:
    """Microbatches of a global batch, and the order of their actions."""
    plan = replace(pipe.plan, balance=grouping == "balanced", schedule=schedule)
    shapes = ingredients.shapes.select(batch)
    seconds = sample_seconds(plan, cost, shapes)
    groups = compose_microbatches(plan, seconds)
    ranks = plan_stage_ranks(plan)
    if schedule != "data-aware":
        return groups, make_order(schedule, stage_rank=ranks, num_microbatches=plan.num_microbatches)
    durations = step_durations(
        plan, cost, stage_seconds(plan, seconds, shapes, groups), communication=links, wire_bytes=4
    )
    return groups, choose_order(durations, schedule=schedule, stage_rank=ranks).order


def _ddp(ingredients: Ingredients) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(ingredients.model(), find_unused_parameters=True)


def _fsdp(ingredients: Ingredients) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = ingredients.model()
    mesh = init_device_mesh("cpu", (2,))
    structure = read_structure(model)
    layers = [*model.get_submodule(structure.layers)]
    tower = model.get_submodule(structure.tower) if structure.tower else None
    if tower is not None:
        layers += [m for m in tower.modules() if isinstance(m, nn.ModuleList) for m in m]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.set_force_sum_reduction_for_comms(True)  # gloo knows no premultiplied sum
    return model


def _replica_step(model: Any, parts: list[Any], label_tokens: int) -> float:
    """One replica's microbatches; gradients meet in the last one (DDP) or are scattered in each (FSDP2)."""
    for parameter in model.parameters():
        parameter.grad = None
    total = torch.zeros((), dtype=torch.float64)
    divisor = torch.tensor(label_tokens)
    for i, part in enumerate(parts):
        with model.no_sync() if hasattr(model, "no_sync") and i < len(parts) - 1 else contextlib.nullcontext():
            loss = model(**part, num_items_in_batch=divisor).loss
            (loss * dist.get_world_size()).backward()
        total += loss.detach().double()
    dist.all_reduce(total)
    return float(total)
