"""TRL's SFTTrainer on image-text conversations: the callback fits as it is, and the steps stay the same."""

import os
import tempfile
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import hf_dflop
from tests.distributed.chats import chat_processor, conversations, model
from tests.distributed.harness import relative_difference

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])


def train(dataset: Dataset, callbacks: list[Any], *, packed: bool = False) -> tuple[Any, list[dict[str, Any]]]:
    processor = chat_processor()
    fresh = model(processor)
    padding = DataCollatorForVisionLanguageModeling(processor)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=fresh,
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
                learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_length=None, report_to=[],
                save_strategy="no", logging_steps=2, use_cpu=True, disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, seed=3,
            ),
            train_dataset=dataset,
            processing_class=processor,
            data_collator=hf_dflop.PackedCollator(padding, fresh) if packed else padding,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
    return trainer, trainer.state.log_history


if __name__ == "__main__":
    PartialState(cpu=True)
    annotated, _ = hf_dflop.profile_dataset(conversations(40), chat_processor(), labels="all")
    callback = hf_dflop.DflopCallback(annotated)
    stock, stock_history = train(annotated, [])
    balanced, history = train(annotated, [callback])
    packed, packed_history = train(annotated, [hf_dflop.DflopCallback(annotated)], packed=True)
    assert balanced.accelerator.num_processes == WORLD
    assert callback.sampler is not None
    assert callback.sampler.objective == "slot"
    parameters = [
        {name: value.detach().double() for name, value in t.accelerator.unwrap_model(t.model).named_parameters()}
        for t in (stock, balanced, packed)
    ]
    for found in parameters[1:]:
        difference = relative_difference(found, parameters[0])
        print(f"sft relative difference {difference:.1e}")
        assert difference <= 1e-6, difference
    losses = [[log["loss"] for log in h if "loss" in log] for h in (stock_history, history, packed_history)]
    assert np.allclose(losses[1:], losses[0], rtol=1e-4), losses
    assert len([log for log in history if "dflop/idle_fraction" in log]) == 3
    metrics = [log for log in history if "loss" in log]
    assert all("mean_token_accuracy" in log for log in metrics), "the loss record lost TRL's own metrics"
    PartialState().destroy_process_group()
