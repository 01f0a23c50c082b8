"""Samples without images under DDP that does not look for unused parameters: no hang, and the single process's steps.

With `save FILE` it runs stock, in one process; with `compare FILE` balanced, in several, and compares.
"""

import functools
import os
import sys
import tempfile
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import hf_dflop
from hf_dflop.data import VisionLanguageCollator
from tests.distributed.chats import chat_processor, conversations, model
from tests.distributed.every_case import EVERY_CASE
from tests.distributed.harness import parameters, relative_difference

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
CASES: dict[str, dict[str, Any]] = {
    # 12 samples a step and 4 microbatches: most samples have images, so that they are spread
    "spread": {"with_images": 0.75, "dummy": False},
    "spread, frozen tower": {"with_images": 0.75, "dummy": False, "frozen": True},
    "spread, checkpointing": {"with_images": 0.75, "dummy": False, "checkpointing": True},
    # so few images that most microbatches have none, and some steps have none at all
    "dummy": {"with_images": 0.07, "dummy": True},
    "dummy, frozen tower": {"with_images": 0.07, "dummy": True, "frozen": True},
    "dummy, checkpointing": {"with_images": 0.07, "dummy": True, "checkpointing": True, "frozen": True},
    "dummy, reentrant": {"with_images": 0.07, "dummy": True, "checkpointing": True, "reentrant": True},
    "dummy and spread": {"with_images": 0.4, "dummy": True},
    # most steps have one image or none, for all ranks together
    "one image for eight ranks": {"with_images": 0.03, "dummy": True, "ranks": 8, "samples": 16},
}
"""What a case is; on 2 `ranks` and with 12 `samples` a step unless it says otherwise."""

COVERED = ("spread, checkpointing", "dummy, frozen tower")
"""Cases whose conditions come together in others; run with every case."""


@functools.cache
def annotated(with_images: float) -> Dataset:
    return hf_dflop.profile_dataset(conversations(96, with_images=with_images), chat_processor(), verify=0)[0]


def train(
    dataset: Dataset, case: dict[str, Any], callbacks: list[Any]
) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    """Trained parameters, gradient norms, and rows of the microbatches of this rank."""
    collator = VisionLanguageCollator(chat_processor(), dummy_image=WORLD > 1 and case["dummy"])
    rows = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collator(samples)
        rows.append(len(batch["input_ids"]) - len(samples))
        return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}

    built = model(chat_processor()).double()
    # What LLaVA never uses, DDP would wait for even if all samples had images.
    next(m for n, m in built.named_modules() if n.endswith("post_layernorm")).requires_grad_(False)
    if case.get("frozen"):
        built.model.vision_tower.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            built,
            TrainingArguments(
                output_dir=folder, per_device_train_batch_size=case.get("samples", 12) // 2 // WORLD,
                gradient_accumulation_steps=2, max_steps=8,
                learning_rate=0.05, optim="sgd", optim_args="momentum=0.9", weight_decay=0.1, max_grad_norm=0.5,
                lr_scheduler_type="constant", seed=11, report_to=[], save_strategy="no", logging_steps=1,
                disable_tqdm=True, use_cpu=True, remove_unused_columns=False, ddp_timeout=60,
                ddp_find_unused_parameters=False, gradient_checkpointing=case.get("checkpointing", False),
                gradient_checkpointing_kwargs={"use_reentrant": case.get("reentrant", False)},
            ),
            train_dataset=dataset,
            data_collator=collate,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
    return parameters(trainer), [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log], rows


if __name__ == "__main__":
    PartialState(cpu=True)
    mode, file = sys.argv[1:]
    saved: dict[str, Any] = {} if mode == "save" else torch.load(file, weights_only=True)
    for name, case in CASES.items():
        if name in COVERED and not EVERY_CASE:
            continue
        if mode == "compare" and case.get("ranks", 2) != WORLD:
            continue
        dataset = annotated(case["with_images"])
        callback = hf_dflop.DflopCallback(dataset)
        found, norms, rows = train(dataset, case, [callback] if mode == "compare" else [])
        if mode == "save":
            saved[name] = (found, norms)
            continue
        expected, expected_norms = saved[name]
        assert (sum(rows) > 0) == case["dummy"], (name, rows)
        assert callback.sampler is not None
        plans = [callback.sampler.plan_of(0, step) for step in range(8)]
        images = [sum(callback.shapes.num_images[plan.indices]) for plan in plans if plan is not None]
        assert case.get("ranks") != 8 or 1 in images, images
        has_image = {plan is not None and callback.sampler.has_image(plan) for plan in plans}
        assert has_image == ({True, False} if case["with_images"] < 0.1 else {True}), (name, has_image)
        difference = relative_difference(found, expected)
        moved = relative_difference(found, dict(model(chat_processor()).double().named_parameters()))
        assert difference <= 1e-12 < 1e-3 < moved, (name, difference, moved)
        assert max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True)) < 1e-10, (name, norms)
        print(f"image free: {name}: {difference:.1e}, {sum(rows)} dummies")
    if mode == "save":
        torch.save(saved, file)
