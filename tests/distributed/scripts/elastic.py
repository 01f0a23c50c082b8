"""Stop in mid-epoch and go on, also on another number of ranks; datasets with a length, and streams.

`save DIR` trains on two ranks and leaves checkpoints; `resume DIR` goes on from them on one. Both use 8 samples a
step, cut into ranks and microbatches in their own way.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from hf_dflop import DflopCallback
from hf_dflop.errors import TrainerError
from tests.distributed import tiny
from tests.distributed.harness import NotingTrainer, parameters, relative_difference, train

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
STOP = 4
COMMON = {"max_steps": 14, "logging_steps": 100, "gradient_accumulation_steps": 4 // WORLD}
STREAMED = {"accelerator_config": {"dispatch_batches": False}}


class Counting(torch.utils.data.Dataset):
    """Notes which rows were read."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.rows[index]


def stream(num_shards: int = 1) -> Any:
    """45 rows: 5 whole steps an epoch, so that step 14 is in the third."""
    return tiny.rows(45)[0].to_iterable_dataset(num_shards=num_shards).shuffle(seed=3, buffer_size=16)


def steps_of(trainer: NotingTrainer, first: int = 0) -> dict[str, list[int]]:
    return {str(step): ids for step, ids in trainer.samples_of_steps().items() if step >= first}


def check_streams_equal_stock() -> None:
    for name, shards, workers in (("dealt", 1, 2), ("shards", 2, 0)):
        settings = {**COMMON, **STREAMED, "max_steps": 5, "learning_rate": 2e-3}
        dtype = torch.float64
        stock = train(stream(shards), [], dtype=dtype, **settings)
        callback = DflopCallback(stream(shards))
        balanced = train(stream(shards), [callback], dtype=dtype, dataloader_num_workers=workers, **settings)
        assert steps_of(stock) == steps_of(balanced), name
        assert stock.noted != balanced.noted, f"{name}: balancing did nothing"
        assert stock.microbatches() == balanced.microbatches()
        difference = relative_difference(parameters(balanced), parameters(stock))
        assert difference <= 1e-12, difference
        record = next(log for log in balanced.state.log_history if "dflop/step_s" in log)
        assert ("dflop/predicted_idle" in record) == (workers == 0)
        print(f"ok stream {name}: {difference:.1e}")


def save(folder: Path) -> None:
    dataset, _ = tiny.rows(45)
    for name, data, extra in (("map", dataset, {}), ("stream", stream(), STREAMED)):
        settings = {**COMMON, **extra}
        whole = train(data, [DflopCallback(data, correct=False)], **settings)
        path = folder / name
        train(data, [DflopCallback(data, correct=False)], output_dir=str(path), save_strategy="steps", save_steps=STOP,
              **(settings | {"max_steps": 2 * STOP}))  # fmt: skip
        again = train(data, [DflopCallback(data, correct=False)], resume=f"{path}/checkpoint-{2 * STOP}",
                      dataloader_num_workers=2, **settings)  # fmt: skip
        assert again.noted == [entry for entry in whole.noted if entry[0] >= 2 * STOP], name
        difference = relative_difference(parameters(again), parameters(whole))
        assert difference <= 1e-6, (name, difference)
        found = steps_of(whole)
        if PartialState().is_main_process:
            (folder / f"{name}.json").write_text(json.dumps(found))
        print(f"ok same ranks {name}")


def resume(folder: Path) -> None:
    dataset, shapes = tiny.rows(45)
    counting = Counting(dataset)
    for name, data, extra, callback in (
        ("map", counting, {}, DflopCallback(shapes, verify=0, correct=False)),
        ("stream", stream(), STREAMED, DflopCallback(stream())),
    ):
        expected = json.loads((folder / f"{name}.json").read_text())
        trainer = train(data, [callback], resume=f"{folder}/{name}/checkpoint-{STOP}", **COMMON, **extra)
        found = steps_of(trainer)
        # How an epoch's last step is filled up depends on the ranks, with Trainer as it is.
        whole = {step: ids for step, ids in expected.items() if int(step) >= STOP and len(set(ids)) == 8}
        whole = {step: ids for step, ids in whole.items() if name == "stream" or int(step) % 6 != 5}
        assert len(whole) >= 8
        assert {step: found[step] for step in whole} == whole, name
        assert min(map(int, found)) == STOP
        print(f"ok other ranks {name}")
    used = sum(len(ids) for ids in steps_of(trainer).values())
    assert used
    probes = 1 + 2  # a row for the dummy image, two for the collator
    assert len(counting.read) <= (14 - STOP) * 8 + probes, "skipped samples were read"

    point = f"{folder}/map/checkpoint-{STOP}"
    other, _ = tiny.rows(45, seed=1)
    with pytest.raises(
        TrainerError, match=r"trained on 45 samples with the fingerprint '\w+', and this dataset has 45"
    ):
        train(other, [DflopCallback(other)], resume=point, **COMMON)
    with pytest.raises(TrainerError, match=r"was resumed, but .* does not have its weights .* Build the model with"):
        train(dataset, [DflopCallback(dataset)], resume=point, model=tiny.model(), **COMMON)
    bigger = COMMON | {"per_device_train_batch_size": 4}
    with pytest.raises(TrainerError, match=r"8 samples per optimizer step, .* uses 16\. .* ignore_data_skip=True"):
        train(dataset, [DflopCallback(dataset)], resume=point, **bigger)
    anew = train(dataset, [DflopCallback(dataset)], resume=point, ignore_data_skip=True, **bigger)
    assert len(steps_of(anew)) == 14 - STOP
    with pytest.raises(TrainerError, match="paired samples across 1 steps, and this run does so across 2"):
        train(dataset, [DflopCallback(dataset, window_steps=2)], resume=point, **COMMON)
    with pytest.raises(TrainerError, match="samples of the stream per optimizer step"):
        train(stream(), [DflopCallback(stream())], resume=f"{folder}/stream/checkpoint-{STOP}", **bigger, **STREAMED)
    train(dataset, [], resume=point, **(COMMON | {"max_steps": 5}))  # a stock run reads it, too
    print("ok refused")


if __name__ == "__main__":
    PartialState(cpu=True)
    mode, path = sys.argv[1], Path(sys.argv[2])
    if mode == "save":
        check_streams_equal_stock()
        save(path)
    else:
        resume(path)
    PartialState().destroy_process_group()
