"""Training under DeepSpeed ZeRO ends with the parameters of the stock run of the same config: `zero.py STAGE`."""

import contextlib
import os
import sys
from typing import Any

import deepspeed
import torch
from accelerate import PartialState

from hf_dflop import DflopCallback
from tests.distributed import tiny
from tests.distributed.harness import NotingTrainer, relative_difference, train

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
STAGE = int(sys.argv[1])
CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": STAGE},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # torch's AdamW: DeepSpeed's own would be compiled first
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def run(dataset: Any, callbacks: list[Any], model: Any) -> tuple[dict[str, torch.Tensor], NotingTrainer]:
    trainer = train(
        dataset,
        callbacks,
        model=model,
        deepspeed=CONFIG,
        max_steps=12,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        learning_rate=2e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine)
    assert trainer.model_wrapped.zero_optimization_stage() == STAGE
    assert trainer.accelerator.num_processes == WORLD
    final = {}
    for name, value in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        with deepspeed.zero.GatheredParameters([value]) if STAGE == 3 else contextlib.nullcontext():
            final[name] = value.detach().double().clone()
    return final, trainer


if __name__ == "__main__":
    # sums by gloo: the kernel for sums in shared memory would be compiled first, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    pictures, _ = tiny.rows(61, text_only=False)
    callback = DflopCallback(pictures)
    # before the first run: after it, transformers builds a model in shards
    models = [tiny.model(), tiny.model()]
    initial = {name: value.detach().double().clone() for name, value in models[0].named_parameters()}
    stock, stock_trainer = run(pictures, [], models[0])
    balanced, trainer = run(pictures, [callback], models[1])
    assert callback.sampler is not None
    assert callback.sampler.objective == ("stage" if STAGE == 3 else "slot")
    assert trainer.samples_of_steps() == stock_trainer.samples_of_steps()
    assert trainer.noted != stock_trainer.noted, "balancing did nothing"
    assert relative_difference(stock, initial) > 0.01
    difference = relative_difference(balanced, stock)
    print(f"zero {STAGE} relative difference {difference:.1e}")
    assert difference <= 1e-5, difference
    PartialState().destroy_process_group()
