"""Two stages on one device in one process: torch's own engine, ours, and the unsplit model without an engine.

All arms run the same modules with the same weights on the same microbatches, all of one shape: with one device there
is nothing to overlap, so what an arm takes beyond the unsplit model is the engine.

In: settings, the model. Out: rows of kind `engine`.

Raises `RuntimeError` where losses or gradients of the arms differ.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from hf_dflop.pipeline import MicrobatchShape, PipelineModel, StepBatch, StepShape
from hf_dflop.pipeline.features import FeatureFormat, read_format
from hf_dflop.pipeline.split import build_part
from hf_dflop.pipeline.structure import read_structure
from hf_dflop.plan import ModulePlan, Plan
from recipes.benchmarks.common.results import Row, rounded
from recipes.benchmarks.gpu.model import MicrobatchMaker, shapes_of
from recipes.benchmarks.gpu.replay import DeviceClock
from recipes.benchmarks.gpu.settings import ENGINE_ARMS, GpuSettings
from recipes.benchmarks.pipeline.torch_stages import TorchLlm, TorchVision

__all__ = ["compare_engines"]

_TOLERANCES = {"loss": 1e-4, "norm": 1e-3}
"""Relative; the norm is that over all gradients, and attention's backward adds in no fixed order on a GPU."""

Batch = dict[str, Any]


class LocalVision(TorchVision):
    """Stage 0 on the rank of the last stage: torch gives the keywords of a step to every local stage."""

    def forward(self, pixel_values: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values)


class TorchEngine:
    """torch's interleaved schedule with both stages on the only rank."""

    def __init__(self, model: Any, plan: Plan, batches: list[Batch], label_tokens: int, device: torch.device) -> None:
        structure = read_structure(model)
        vision, llm = (build_part(model, structure, plan, stage) for stage in (0, 1))
        first = batches[0]
        with torch.no_grad():
            form: FeatureFormat = read_format(vision.encode({"pixel_values": first["pixel_values"][:1]})["image"])
        parts = (LocalVision(vision, form), TorchLlm(llm, form))
        stages = [PipelineStage(part, index, 2, device) for index, part in enumerate(parts)]
        self._schedule = ScheduleInterleaved1F1B(
            stages, len(batches), loss_fn=lambda output, target: output.sum(), scale_grads=False
        )
        text = {key: torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "attention_mask", "labels")}
        features = int((first["input_ids"] == model.config.image_token_id).sum())
        self._pixels = torch.cat([batch["pixel_values"] for batch in batches])
        self._given = text | {
            "num_features": torch.full((len(batches),), features),  # read on the host
            "divisor": torch.full((len(batches),), label_tokens, device=device),
        }

    def step(self) -> float:
        losses: list[torch.Tensor] = []
        self._schedule.step(
            self._pixels, target=self._given["labels"], losses=losses, return_outputs=False, **self._given
        )
        return float(torch.stack([loss.detach().sum() for loss in losses]).double().sum())


def _unsplit(model: Any, batches: list[Batch], divisor: torch.Tensor) -> float:
    losses = []
    for batch in batches:
        loss = model(**batch, num_items_in_batch=divisor).loss
        loss.backward()
        losses.append(loss.detach())
    return float(torch.stack(losses).double().sum())


def _step_batch(batches: list[Batch], samples: Any, label_tokens: int) -> StepBatch:
    shape = MicrobatchShape.of(samples.llm_tokens.tolist(), samples.image_tokens.tolist())
    return StepBatch(
        shape=StepShape(microbatches=((shape,),) * len(batches), label_tokens=label_tokens),
        text=tuple({key: value for key, value in batch.items() if key != "pixel_values"} for batch in batches),
        vision=tuple({"pixel_values": batch["pixel_values"]} for batch in batches),
    )


def compare_engines(settings: GpuSettings, model: Any) -> list[Row]:
    """Time the arms in turn; the process group of one process exists while it runs."""
    on_gpu = torch.device(settings.device).type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")  # one process: the host's name need not resolve
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _compare(settings, model)
    finally:
        dist.destroy_process_group()


def _compare(settings: GpuSettings, model: Any) -> list[Row]:
    device = torch.device(settings.device)
    number, count = settings.engine_samples, settings.engine_microbatches
    same = np.ones(number, dtype=np.int64)
    samples = shapes_of(settings, settings.engine_tiles * same, settings.engine_text_tokens * same, same)
    maker = MicrobatchMaker(model, settings)
    batches = [maker(samples, range(number), packed=False) for _ in range(count)]
    label_tokens = count * int(samples.label_tokens.sum())
    plan = Plan(
        placement="colocated",
        vision=ModulePlan(layers=(settings.vision_layers,)),
        llm=ModulePlan(layers=(settings.llm_layers,)),
        num_microbatches=count,
        balance=False,
        padded=True,
    )
    theirs = TorchEngine(model, plan, batches, label_tokens, device)
    pipe = PipelineModel.from_model(model, plan=plan, device=device)
    given = _step_batch(batches, samples, label_tokens)
    divisor = torch.tensor(label_tokens, device=device)
    arms: dict[str, Callable[[], float]] = {
        "unsplit": partial(_unsplit, model, batches, divisor),
        "torch": theirs.step,
        "hf_dflop": lambda: pipe.step(given).loss,
    }
    assert list(arms) == list(ENGINE_ARMS)
    clock = DeviceClock(settings.device)
    names = list(arms)
    for name in names:
        _timed(arms[name], model, clock)
    rows: list[Row] = []
    for round_ in range(settings.engine_rounds):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            seconds, loss, norm = _timed(arms[name], model, clock)
            rows.append(
                {"kind": "engine", "arm": name, "round": round_, "seconds": seconds, "loss": loss, "norm": norm}
            )
    check_same(rows)
    return [rounded(row) for row in rows]


def _timed(run: Callable[[], float], model: Any, clock: DeviceClock) -> tuple[float, float, float]:
    """Seconds of a step on the host, from an idle device to an idle device; its loss and norm of gradients."""
    model.zero_grad(set_to_none=True)
    clock.finish()
    begin = time.perf_counter()
    loss = run()
    clock.finish()
    seconds = time.perf_counter() - begin
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch.stack([grad.norm(dtype=torch.float32) for grad in grads])
    return seconds, loss, float(norms.norm())


def check_same(rows: list[Row]) -> None:
    """Losses and gradients of all arms and rounds are those of the first.

    Raises:
        RuntimeError: they are not.
    """
    for name, tolerance in _TOLERANCES.items():
        found = {row["arm"]: row[name] for row in rows}
        if not all(abs(row[name] / rows[0][name] - 1) <= tolerance for row in rows):
            raise RuntimeError(f"the engines give different {name} on the same microbatches: {found}")
