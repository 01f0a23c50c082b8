"""Every way to cut an epoch into steps: the samples of each step are the stock run's, also after a resume."""

import itertools
import os
import tempfile
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_dflop import DflopCallback
from hf_dflop.errors import BalanceError, TrainerError
from tests.distributed import tiny
from tests.distributed.every_case import EVERY_CASE
from tests.distributed.harness import DealingTrainer, train

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])


def check(name: str, count: int, **arguments: Any) -> None:
    dataset, _ = tiny.rows(count)
    settings = {
        "max_steps": -1, "num_train_epochs": 2, "logging_steps": 100, "trainer_class": DealingTrainer, **arguments
    }  # fmt: skip
    stock = train(dataset, [], **settings)
    balanced = train(dataset, [DflopCallback(dataset)], **settings)
    assert stock.samples_of_steps() == balanced.samples_of_steps(), name
    assert stock.microbatches() == balanced.microbatches(), name
    assert stock.state.global_step == balanced.state.global_step > 0, name
    print(f"ok {name} n={count} {arguments}")


def check_resume(stop: int, **arguments: Any) -> None:
    """Stop after `stop` steps, resume, and compare the rest, microbatch by microbatch."""
    dataset, _ = tiny.rows(45)
    settings = {
        "max_steps": 11, "per_device_train_batch_size": 2, "logging_steps": 100, "trainer_class": DealingTrainer,
        **arguments,
    }  # fmt: skip
    whole = train(dataset, [DflopCallback(dataset)], **settings)
    stock = train(dataset, [], **settings)
    holder = [tempfile.mkdtemp()]
    broadcast_object_list(holder)
    train(dataset, [DflopCallback(dataset)], output_dir=holder[0], save_strategy="steps", save_steps=stop,
          **(settings | {"max_steps": stop}))  # fmt: skip
    resumed = train(dataset, [DflopCallback(dataset)], resume=f"{holder[0]}/checkpoint-{stop}", **settings)
    assert resumed.noted == [entry for entry in whole.noted if entry[0] >= stop], (stop, arguments)
    expected = {step: ids for step, ids in stock.samples_of_steps().items() if step >= stop}
    assert resumed.samples_of_steps() == expected, (stop, arguments)
    print(f"ok resume at {stop} {arguments}")


def check_refused_hang() -> None:
    """A rank without images would leave DDP waiting: refused on all ranks, unless DDP looks for unused parameters."""
    mixed, _ = tiny.rows(32)
    remedies = r"(?s)dummy_image=True.*ddp_find_unused_parameters=True"
    with pytest.raises(BalanceError, match=r"epoch 0, step \d has \d samples with an image for 4 microbatches"):
        train(mixed, [DflopCallback(mixed)], ddp_find_unused_parameters=False)
    with pytest.raises(TrainerError, match="balance=False does not spread"):
        train(mixed, [DflopCallback(mixed, balance=False)], ddp_find_unused_parameters=False)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    with pytest.raises(TrainerError, match=remedies):
        train(mixed, [DflopCallback(mixed)], per_device_train_batch_size=1, **checkpointing)
    remedy = train(mixed, [DflopCallback(mixed)], ddp_find_unused_parameters=True, **checkpointing)
    assert remedy.state.global_step == 4
    print("ok refused hang")


if __name__ == "__main__":
    PartialState(cpu=True)
    if WORLD > 1:
        check_refused_hang()
    # Without every case: all of any two of the four.
    covering = ((0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0))
    for a, b, c, d in itertools.product((0, 1), repeat=4) if EVERY_CASE else covering:
        whole, size, slots, drop = 32 - 3 * a, 1 + b, 1 + 2 * c, bool(d)
        check("grid", whole, per_device_train_batch_size=size, gradient_accumulation_steps=slots,
              dataloader_drop_last=drop)  # fmt: skip
    if WORLD > 1 or EVERY_CASE:
        check("workers", 29, dataloader_num_workers=2)
        check("persistent workers", 29, dataloader_num_workers=1, dataloader_persistent_workers=True)
        check("max_steps", 29, max_steps=7)
        check("one step", 5, per_device_train_batch_size=1)
        check("not seedable", 29, accelerator_config={"use_seedable_sampler": False})
        check("uneven", 29, accelerator_config={"even_batches": False})
        check("uneven, exact ranks", 28, accelerator_config={"even_batches": False})
        check("split", 29, per_device_train_batch_size=4, accelerator_config={"split_batches": True})
        check("data seed", 29, data_seed=5)
    for stop, workers in itertools.product((2, 7), (0, 2)) if EVERY_CASE else ((2, 2), (7, 0)):
        check_resume(stop, dataloader_num_workers=workers)
    check_resume(3, gradient_accumulation_steps=3)
    PartialState().destroy_process_group()
