"""24 steps of stock and of balanced training agree in every parameter: DDP and FSDP2, padded and packed, LoRA.

`ddp FILE` trains under DDP and saves what the stock runs end with, then a model that transformers sharded when it was
loaded; `fsdp FILE` trains under FSDP2 through accelerate. Both compare with the stock DDP runs. The rows without an
image, on which a stock FSDP run breaks off, get a dummy image there. Without every case, as many combinations are
trained as have, under each of the two, every two of accumulation, packing and LoRA together at least once.
"""

import itertools
import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from hf_dflop import DflopCallback, PackedCollator
from tests.distributed import tiny
from tests.distributed.every_case import EVERY_CASE
from tests.distributed.harness import NotingTrainer, parameters, relative_difference, train
from tests.distributed.sharding import FSDP_ARGUMENTS, assert_sharded, let_cpus_shard

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
STEPS = 24
SHARDED = sys.argv[1] == "fsdp"
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
SLOTS = {1: 9, 3: 3}
"""Microbatches of a step, and samples in each: 18 samples a step, on two ranks."""
ADAMW = {"optim": "adamw_torch_fused", "learning_rate": 2e-3}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5}
CASES = [
    (1, True, False, torch.float64), (3, True, True, torch.float64), (1, False, True, torch.float32),
    (3, True, False, torch.float32), (3, False, False, torch.float32),
]  # fmt: skip
"""Microbatches, packed, LoRA, precision."""
if EVERY_CASE:
    CASES = list(dict.fromkeys([*CASES, *itertools.product(SLOTS, (True, False), (False, True), [torch.float64])]))
Final = dict[str, torch.Tensor]


def model(dtype: torch.dtype, lora: bool, loaded: bool = False) -> Any:
    fresh = tiny.model(dtype)
    if loaded:
        from transformers.distributed import DistributedConfig

        folder = f"{sys.argv[2]}.model"
        fresh.save_pretrained(folder)
        torch.distributed.barrier()
        return type(fresh).from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=WORLD))
    if not lora:
        return fresh
    torch.manual_seed(1)
    return get_peft_model(fresh, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1"])).to(dtype)


def run(
    dataset: Any, *, slots: int, balanced: bool, packed: bool = False, lora: bool = False,
    dtype: torch.dtype = torch.float32, dummy: bool = False, loaded: bool = False,
) -> tuple[Final, NotingTrainer]:  # fmt: skip
    fresh = model(dtype, lora, loaded)
    collator: Any = tiny.Collate(dtype, dummy=dummy)
    trainer = train(
        dataset,
        [DflopCallback(dataset)] if balanced else [],
        dtype=dtype,
        model=fresh,
        collator=PackedCollator(collator, fresh) if packed else collator,
        max_steps=STEPS,
        per_device_train_batch_size=SLOTS[slots],
        gradient_accumulation_steps=slots,
        logging_steps=STEPS,
        weight_decay=0.1,
        max_grad_norm=0.5,
        # AdamW divides the tiny gradients of adapters by themselves, and their rounding with them: 5e-5 in fp32.
        **(SGD if lora and dtype == torch.float32 else ADAMW),
        **(FSDP_ARGUMENTS if SHARDED else {}),
    )
    assert trainer.accelerator.num_processes == WORLD
    assert trainer.state.global_step == STEPS
    if SHARDED:
        assert_sharded(trainer)
    elif loaded:  # transformers has a plan for the LLM's layers alone
        assert_sharded(trainer, num_layers=2)
    else:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert lora == any("lora" in name for name in trained)
    return {name: value for name, value in parameters(trainer).items() if name in trained}, trainer


def check(name: str, found: tuple[Final, NotingTrainer], stock: tuple[Final, NotingTrainer], tolerance: float) -> None:
    against_stock(name, found[0], stock[0], tolerance)
    assert found[1].samples_of_steps() == stock[1].samples_of_steps(), name
    assert found[1].noted != stock[1].noted, f"{name}: balancing did nothing, so nothing was tested"


def against_stock(name: str, final: Final, stock: Final, tolerance: float) -> None:
    difference = relative_difference(final, stock)
    print(f"equal_runs {name}: {difference:.1e}")
    assert difference <= tolerance, (name, difference)


def moved(final: Final, dtype: torch.dtype = torch.float32, *, lora: bool = False) -> float:
    initial = {name: value.detach().double() for name, value in model(dtype, lora).named_parameters()}
    return relative_difference(final, {name: initial[name] for name in final})


def under_ddp(path: str) -> None:
    mixed, _ = tiny.rows(61)
    saved: dict[Any, Final] = {}
    for slots, lora, dtype in dict.fromkeys((slots, lora, dtype) for slots, _, lora, dtype in CASES):
        stock = run(mixed, slots=slots, balanced=False, lora=lora, dtype=dtype)
        assert moved(stock[0], dtype, lora=lora) > 0.01, moved(stock[0], dtype, lora=lora)
        saved[f"{slots} {lora} {dtype}"] = stock[0]
        for packed in (packed for packed in (False, True) if (slots, packed, lora, dtype) in CASES):
            found = run(mixed, slots=slots, balanced=True, packed=packed, lora=lora, dtype=dtype)
            check(f"ddp slots={slots} packed={packed} lora={lora} {dtype}", found, stock, TOLERANCES[dtype])
    if PartialState().is_main_process:
        torch.save(saved, path)
    final, _ = run(mixed, slots=3, balanced=True, packed=True, dummy=True, loaded=True)
    against_stock("loaded slots=3 packed=True", final, saved["3 False torch.float32"], TOLERANCES[torch.float32])


def under_fsdp(path: str) -> None:
    let_cpus_shard()
    saved = torch.load(path)
    pictures, _ = tiny.rows(61, text_only=False)
    stock = run(pictures, slots=3, balanced=False)
    assert moved(stock[0]) > 0.05
    for packed in (False, True) if EVERY_CASE else (False,):
        found = run(pictures, slots=3, balanced=True, packed=packed)
        check(f"fsdp pictures slots=3 packed={packed}", found, stock, TOLERANCES[torch.float32])
    mixed, _ = tiny.rows(61)
    for slots, packed, lora, dtype in CASES if EVERY_CASE else CASES[:3]:
        final, _ = run(mixed, slots=slots, balanced=True, packed=packed, lora=lora, dtype=dtype, dummy=True)
        name = f"fsdp slots={slots} packed={packed} lora={lora} {dtype}, against stock DDP"
        against_stock(name, final, saved[f"{slots} {lora} {dtype}"], TOLERANCES[dtype])


if __name__ == "__main__":
    PartialState(cpu=True)
    {"ddp": under_ddp, "fsdp": under_fsdp}[sys.argv[1]](sys.argv[2])
    PartialState().destroy_process_group()
