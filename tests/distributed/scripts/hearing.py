"""Balanced training on sounds ends with the parameters of stock training, from the same samples per step."""

import os
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_dflop import DflopCallback, profile_dataset
from hf_dflop.errors import TrainerError
from tests.distributed import hearing
from tests.distributed.every_case import EVERY_CASE
from tests.distributed.harness import parameters, relative_difference, train
from tests.unit.rows import tiny

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
STEPS = 4
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "weight_decay": 0.1,
    "max_grad_norm": 0.5, "learning_rate": 0.1, "optim": "sgd", "optim_args": "momentum=0.9",
}  # fmt: skip


def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Qwen2-Audio's own loss is the mean of a microbatch, whatever Trainer tells it."""
    vocab = outputs.logits.shape[-1]
    return ForCausalLMLoss(outputs.logits, labels, vocab_size=vocab, num_items_in_batch=num_items_in_batch)


def compare(
    name: str, processor: Any, build: Any, dataset: Any, dtype: torch.dtype, strict: bool = False, **given: Any
) -> None:
    """`strict`: the balanced run hangs if a rank leaves the encoder out."""
    initial = {key: value.detach().double() for key, value in build(processor).named_parameters()}
    runs = []
    for callbacks in ([], [DflopCallback(dataset)]):
        model = build(processor).to(dtype)
        collator = hearing.Collate(processor, dtype)
        unused = {"ddp_find_unused_parameters": False} if strict and callbacks else {}
        runs.append(train(dataset, callbacks, model=model, collator=collator, **SETTINGS, **unused, **given))
    stock, balanced = runs
    assert stock.accelerator.num_processes == WORLD
    assert stock.samples_of_steps() == balanced.samples_of_steps()
    assert len(stock.samples_of_steps()) == STEPS
    assert stock.microbatches() == balanced.microbatches()
    assert stock.noted != balanced.noted, "balancing did nothing"
    final = parameters(stock)
    difference, moved = relative_difference(parameters(balanced), final), relative_difference(final, initial)
    print(f"hearing {name} {dtype}: {difference:.1e}, moved {moved:.1e}")
    assert moved > 1e-2, moved
    assert difference <= (1e-5 if dtype == torch.float32 else 1e-12), difference
    for part in ("audio_tower", "language_model", *(["visual"] if name == "omni" else [])):
        of_part = {key: value for key, value in final.items() if part in key}
        assert relative_difference(of_part, {key: initial[key] for key in of_part}) > 1e-3, part


if __name__ == "__main__":
    PartialState(cpu=True)
    flamingo = tiny.audioflamingo3()
    dataset, _ = profile_dataset(hearing.rows(29, longest_s=4), flamingo, verify=0)
    assert len(set(dataset["dflop_audio_frames"][:])) > 3
    compare("flamingo", flamingo, hearing.audioflamingo3, dataset, torch.float32, strict=True)
    if EVERY_CASE:
        compare("flamingo", flamingo, hearing.audioflamingo3, dataset, torch.float64)

    qwen = tiny.qwen2_audio(2)
    dataset, _ = profile_dataset(hearing.rows(29, longest_s=2), qwen, verify=0)
    compare(
        "qwen2_audio", qwen, lambda p: hearing.qwen2_audio(p, 2), dataset, torch.float32,
        compute_loss_func=token_mean,
    )  # fmt: skip
    with pytest.raises(TrainerError, match="does not divide its loss by num_items_in_batch"):
        train(
            dataset, [DflopCallback(dataset)], model=hearing.qwen2_audio(qwen, 2),
            collator=hearing.Collate(qwen, torch.float32), **SETTINGS,
        )  # fmt: skip
    print("mean loss refused")

    omni = tiny.qwen2_5_omni()
    model = hearing.qwen2_5_omni(omni)
    dataset, _ = profile_dataset(hearing.rows(29, longest_s=2, images=True), omni, config=model.config, verify=0)
    compare("omni", omni, hearing.qwen2_5_omni, dataset, torch.float32)
    PartialState().destroy_process_group()
