"""Steps planned in a thread are the steps planned in place; the loop hardly waits for them."""

import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.data.sampler import BalancedBatchSampler
from hf_dflop.data.step_plan import stock_caps
from hf_dflop.errors import BalanceError
from hf_dflop.shapes import Shapes
from tests.distributed import tiny


def build(num_samples: int, per_step: int, num_ranks: int = 4, num_slots: int = 2, **kwargs: Any) -> Any:
    generator = np.random.default_rng(0)
    images = np.minimum(generator.geometric(0.4, num_samples) - 1, 12)
    text = np.clip(generator.lognormal(4, 1, num_samples), 4, 4000).astype(np.int64)
    shapes = Shapes(
        num_images=images, image_tiles=images, image_patches=576 * images, image_patches_sq=images * 576**2,
        image_tokens=576 * images, text_tokens=text, label_tokens=text // 2,
    )  # fmt: skip
    size = per_step // (num_ranks * num_slots)

    def stock() -> list[list[list[int]]]:
        batches = np.arange(num_samples).reshape(-1, num_ranks, size)
        return [batches[:, rank].tolist() for rank in range(num_ranks)]

    defaults: dict[str, Any] = {"rank": 1, "objective": "step", "padded": False, "caps": stock_caps(shapes, size)}
    return BalancedBatchSampler(
        stock,
        shapes,
        CostModel.analytic(ModelSpec.from_config(tiny.model().config)),
        num_ranks=num_ranks,
        num_slots=num_slots,
        length=num_samples // size // num_ranks,
        **(defaults | kwargs),
    )


@pytest.mark.parametrize(("objective", "padded"), [("step", False), ("stage", True)])
def test_the_plans_do_not_depend_on_the_look_ahead(objective: str, padded: bool) -> None:
    epochs = []
    for depth in (0, 1, 4):
        sampler = build(640, 64, objective=objective, padded=padded, look_ahead_steps=depth)
        sampler.skip_to(2)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 20
        assert sampler.plan_of(0, 1) is None
        assert [sampler.plan_of(0, step).step for step in range(2, 10)] == list(range(2, 10))
        assert sampler.plan_of(0, 2).scheduling_wait_s > 0
    assert epochs[0] == epochs[1] == epochs[2]


def test_loader_workers_forked_beside_the_thread_load_the_same() -> None:
    sampler = build(640, 64)
    expected = list(sampler)
    running = iter(sampler)
    next(running)
    loader: Any = DataLoader(range(640), batch_sampler=sampler, num_workers=2, collate_fn=list, timeout=60)  # type: ignore[arg-type]
    assert list(loader) == expected
    assert [next(running)] == expected[1:2]


def test_a_step_that_cannot_be_planned_is_named_in_the_iterating_thread() -> None:
    sampler = build(640, 64)
    sampler._tokens[5 * 64 + 3] = 10**9
    batches = iter(sampler)
    assert sum(1 for _, _ in zip(range(10), batches, strict=False)) == 10
    with pytest.raises(BalanceError, match="epoch 0, step 5"):
        next(batches)
    deadline = time.monotonic() + 5
    while any(t.name.startswith("hf_dflop-plan") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("hf_dflop-plan") for t in threading.enumerate())


@pytest.mark.parametrize(("objective", "padded"), [("step", False), ("stage", True)])
def test_the_loop_hardly_waits_for_4096_samples_a_step(objective: str, padded: bool) -> None:
    """Under 0.5 % of a step of 1 s; here the steps are shorter, and the waiting is the same."""
    torch.set_num_threads(1)
    sampler = build(4096 * 5, 4096, num_ranks=16, num_slots=16, objective=objective, padded=padded)
    sampler.warm_up()
    matrix = torch.ones(400, 400)
    for number, _ in enumerate(sampler):
        if number % 16 == 0:
            end = time.thread_time() + 0.6  # of this thread: on a busy machine the planning thread is slowed as well
            while time.thread_time() < end:
                matrix @ matrix
    waits = [sampler.plan_of(0, step).scheduling_wait_s for step in range(2, 5)]
    assert float(np.median(waits)) < 0.005, waits


def test_warming_up_compiles_everything() -> None:
    code = """
import importlib, numpy as np
from hf_dflop.balance import assign, warm_up
names = ("greedy", "descent", "search", "padding")
def compiled():
    modules = [vars(importlib.import_module(f"hf_dflop.balance.{name}")) for name in names]
    functions = {id(f): f for module in modules for f in module.values() if hasattr(f, "signatures")}
    return {f.__name__: len(f.signatures) for f in functions.values()}
for padded in (False, True):
    warm_up(objective="step", padded=padded)
    before = compiled()
    assert before["search"], before
    for n, ranks, slots in ((512, 8, 8), (64, 8, 1), (8, 4, 2), (7, 2, 2)):
        generator = np.random.default_rng(n)
        vision, llm = generator.lognormal(0, 1, (2, n))
        counts = np.ceil(llm).astype(int)
        stock = [np.array_split(part, slots) for part in np.array_split(np.arange(n), ranks)]
        for cap in (None, n * int(counts.max())):
            assign(vision, llm, num_ranks=ranks, num_slots=slots, objective="step", padded=padded, baseline=stock,
                   tokens=counts, max_tokens=cap, patches=counts, max_patches=cap,
                   spread=np.arange(n) % 3 < 2)
    assert compiled() == before, (padded, before, compiled())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_images_are_spread_over_all_microbatches() -> None:
    def bare(**kwargs: Any) -> int:
        sampler = build(640, 64, **kwargs)
        sampler._has_image = np.arange(640) % 7 == 0  # 9 or 10 of the 64 samples of a step, for 8 microbatches
        return sum(not sampler._has_image[batch].any() for batch in sampler)

    assert bare() > 0
    assert bare(spread_images=True) == bare(spread_images=True, fill_images=True) == 0


def test_too_few_images_are_refused_before_the_epoch_unless_they_are_filled_in() -> None:
    sampler = build(640, 64, spread_images=True)
    sampler._has_image[3 * 64 + 7 : 4 * 64] = False  # of step 3, at most 7 samples keep an image, for 8 microbatches
    with pytest.raises(BalanceError, match=r"epoch 0, step 3 has \d samples with an image for 8 microbatches.*dummy_"):
        next(iter(sampler))
    filled = build(640, 64, spread_images=True, fill_images=True)
    filled._has_image[3 * 64 + 7 : 4 * 64] = False
    assert len(list(filled)) == len(filled)
    plan = filled.plan_of(0, 3)
    assert plan.assignment.is_spread is False
    assert filled.has_image(plan)
