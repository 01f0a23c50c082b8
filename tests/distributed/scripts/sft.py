"""TRL's SFTTrainer on image-text conversations: the callback fits as it is, and the steps stay the same."""

import os
import tempfile
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

import hf_dflop
from tests.distributed.harness import relative_difference
from tests.unit.rows import tiny

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])


def conversations(count: int) -> Dataset:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        num_images = int(generator.integers(1, 4))
        words = " ".join(generator.choice(["a", "cat", "picture", "the sea"], int(generator.lognormal(2, 0.9)) + 1))
        rows.append(
            {
                "images": [
                    {"bytes": _png(generator, *generator.integers(20, 90, 2).tolist()), "path": None}
                    for _ in range(num_images)
                ],
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}] * num_images
                     + [{"type": "text", "text": "What is in the image?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": words}]},
                ],
            }
        )  # fmt: skip
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"images": List(Image()), "messages": List({"role": Value("string"), "content": List(part)})})
    return Dataset.from_list(rows, features=features)


def _png(generator: np.random.Generator, width: int, height: int) -> bytes:
    import io

    from PIL import Image as Picture

    buffer = io.BytesIO()
    Picture.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def chat_processor() -> Any:
    """TRL adds no special tokens to what the chat template gives, so the template holds them, as real ones do."""
    processor = tiny.llava()
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor


def model(processor: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=len(processor.tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            ),
            image_token_id=processor.image_token_id, vision_feature_layer=-1, image_seq_length=16,
        )
    )  # fmt: skip


def train(dataset: Dataset, callbacks: list[Any]) -> tuple[Any, list[dict[str, Any]]]:
    processor = chat_processor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model(processor),
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
                learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_length=None, report_to=[],
                save_strategy="no", logging_steps=2, use_cpu=True, disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, seed=3,
            ),
            train_dataset=dataset,
            processing_class=processor,
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
    assert balanced.accelerator.num_processes == WORLD
    assert callback.sampler is not None
    assert callback.sampler.objective == "slot"
    parameters = [
        {name: value.detach().double() for name, value in t.accelerator.unwrap_model(t.model).named_parameters()}
        for t in (stock, balanced)
    ]
    difference = relative_difference(parameters[1], parameters[0])
    print(f"sft relative difference {difference:.1e}")
    assert difference <= 1e-6, difference
    losses = [[log["loss"] for log in h if "loss" in log] for h in (stock_history, history)]
    assert np.allclose(*losses, rtol=1e-4), losses
    assert len([log for log in history if "dflop/idle_fraction" in log]) == 3
    metrics = [log for log in history if "loss" in log]
    assert all("mean_token_accuracy" in log for log in metrics), "the loss record lost TRL's own metrics"
