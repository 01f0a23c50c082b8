"""A hand-written Accelerate loop over a pipeline against the stock loop in one process. Arguments: what, a folder.

stock FOLDER            (one process) two epochs of a stock Accelerate loop, in float32 and float64
example FOLDER PP,DP    the example in the docstring of `hf_dflop.prepare`, run; against `stock`
loop FOLDER PP,DP       a loop that takes an optimizer class; its losses and norms; saved and resumed; what must fail
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

import hf_dflop
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import pipelines
from tests.distributed.ingredients import ingredients
from tests.distributed.scripts.pipeline_trainer import TOLERANCE

MICROBATCHES, CALLS, SIZE, EPOCHS = 2, 2, 2, 2
MAX_NORM, SEED = 0.5, 11
ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
EVEN = DataLoaderConfiguration(use_seedable_sampler=True, even_batches=False)
"""One process has no round of microbatches to fill up at an epoch's end."""


def fresh(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Model, annotated rows, collator; the seed is set, from which the order of the rows follows."""
    built, rows, collator = ingredients(dtype)
    set_seed(SEED)
    return built, rows, collator


def stock(folder: Path) -> None:
    found = {}
    for name in TOLERANCE:
        built, rows, collator = fresh(getattr(torch, name))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICROBATCHES * CALLS, dataloader_config=EVEN)
        optimizer = torch.optim.AdamW(built.parameters(), **ADAMW)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
        loader = DataLoader(rows, batch_size=SIZE, shuffle=True, collate_fn=collator)
        built, optimizer, loader, scheduler = accelerator.prepare(built, optimizer, loader, scheduler)
        log = []
        for epoch in range(EPOCHS):
            loader.set_epoch(epoch)
            batches = list(loader)  # all at once, since a step's label tokens must be known before it begins
            steps = [batches[i : i + MICROBATCHES * CALLS] for i in range(0, len(batches), MICROBATCHES * CALLS)]
            for step in steps:
                tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
                losses = [built(**batch, num_items_in_batch=torch.tensor(tokens)).loss for batch in step]
                for loss in losses:
                    loss.backward()
                norm = accelerator.clip_grad_norm_(built.parameters(), MAX_NORM)
                log.append((sum(float(loss.detach()) for loss in losses), float(norm), scheduler.get_last_lr()[0]))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        assert min(norm for _, norm, _ in log) > MAX_NORM, log  # clipping is at work
        found[name] = {
            "log": log,
            "learning_rate": scheduler.get_last_lr(),
            "state": {key: value.detach() for key, value in built.named_parameters()},
        }
    torch.save(found, folder / "loop.pt")


def make_plan(pp: int, dp: int) -> Plan:
    layers = (1, 1) if pp == 2 else (2,)
    return Plan(
        vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=layers, dp=dp), num_microbatches=MICROBATCHES // dp
    )


def moved(model: Any, expected: Any) -> float:
    """Largest difference of parameters from the stock run's, over all ranks."""
    scale = max(float(value.abs().max()) for value in expected.values())
    own = model.named_parameters()
    return pipelines.over_ranks(
        max(float((value.detach() - expected[name]).abs().max()) / scale for name, value in own)
    )


def example(folder: Path, layout: tuple[int, int]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", str(hf_dflop.prepare.__doc__), re.DOTALL)
    stock_run = torch.load(folder / "loop.pt", weights_only=False)
    for dtype, tolerance in TOLERANCE.items():
        model, annotated, collator = fresh(getattr(torch, dtype))
        out = folder / f"example{dtype}"
        names = {
            "model": model,
            "annotated": annotated,
            "collator": collator,
            "plan": make_plan(*layout),
            "folder": out,
        }
        shared = {"hf_dflop": hf_dflop, "torch": torch, "Accelerator": partial(Accelerator, dataloader_config=EVEN)}
        exec(re.sub("^    ", "", code, flags=re.MULTILINE), shared | names, names)
        pipe = names["model"]
        worst = moved(pipe, stock_run[dtype]["state"])
        assert worst <= tolerance, (dtype, worst)
        loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=getattr(torch, dtype)).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in pipe.state_dict().items())
        assert set(loaded) == set(stock_run[dtype]["state"])
        assert names["scheduler"].get_last_lr() == stock_run[dtype]["learning_rate"]
        if pipe.place.rank == 0:
            print(f"example: {layout} {dtype} {worst:.1e}", flush=True)


def loop(folder: Path, layout: tuple[int, int]) -> None:
    stock_run = torch.load(folder / "loop.pt", weights_only=False)
    for dtype, tolerance in TOLERANCE.items():
        run = Run(layout, dtype)
        run.train(save=folder / "state")
        for (loss, norm, _), (stock_loss, stock_norm, _) in zip(run.log, stock_run[dtype]["log"], strict=False):
            assert abs(loss / stock_loss - 1) <= tolerance, (dtype, loss, stock_loss)
            assert abs(norm / stock_norm - 1) <= tolerance, (dtype, norm, stock_norm)
        assert len(run.log) == 4
        again = Run(layout, dtype)
        again.train(resume=folder / "state")
        expected = run.model.state_dict()
        unequal = {
            name: float((value - expected[name]).abs().max())
            for name, value in again.model.state_dict().items()
            if not torch.equal(value, expected[name])
        }
        assert not unequal, (dtype, unequal)
    local = Run(layout, "float32", local_norm=True)
    local.train()
    differs = max(abs(a / b - 1) for (_, a, _), (_, b, _) in zip(local.log, stock_run["float32"]["log"], strict=False))
    assert pipelines.over_ranks(differs) > 1e-3, differs  # the check can fail
    if local.model.place.rank == 0:
        print("loop: equal, and resumed", flush=True)


class Run:
    """One epoch with an optimizer class, a dataloader and a scheduler on the returned optimizer."""

    def __init__(self, layout: tuple[int, int], dtype: str, *, local_norm: bool = False) -> None:
        built, rows, collator = fresh(getattr(torch, dtype))
        self.accelerator = Accelerator(gradient_accumulation_steps=CALLS, dataloader_config=EVEN)
        loader = DataLoader(rows, batch_size=SIZE, shuffle=True, collate_fn=collator)
        factory = partial(torch.optim.AdamW, **ADAMW)
        self.model, self.optimizer, self.loader = hf_dflop.prepare(
            self.accelerator, built, factory, loader, make_plan(*layout), check=False
        )
        self.scheduler = self.accelerator.prepare(
            torch.optim.lr_scheduler.LinearLR(self.optimizer.optimizer, total_iters=10)
        )
        self.local_norm = local_norm
        self.log: list[tuple[float, float, float]] = []

    def train(self, *, save: Path | None = None, resume: Path | None = None) -> None:
        loader, loss_sum = self.loader, 0.0
        if resume is not None:
            self.accelerator.load_state(str(resume))
            loader = self.accelerator.skip_first_batches(loader, 2 * CALLS)
        for calls, batch in enumerate(loader, start=1):
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch).loss
                loss_sum += float(loss.detach()) / CALLS
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    parameters = self.model.parameters()
                    clip = torch.nn.utils.clip_grad_norm_ if self.local_norm else self.accelerator.clip_grad_norm_
                    norm = float(clip(parameters, MAX_NORM))
                    self.log.append((loss_sum, norm, self.scheduler.get_last_lr()[0]))
                    loss_sum = 0.0
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if save is not None and calls == 2 * CALLS:
                self.accelerator.save_state(str(save))


def prepare() -> None:
    for name in TOLERANCE:
        ingredients(getattr(torch, name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    pipelines.keep_float64()
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "stock":
        stock(where)
    else:
        {"example": example, "loop": loop}[what](where, tuple(map(int, sys.argv[3].split(","))))
        torch.distributed.destroy_process_group()
