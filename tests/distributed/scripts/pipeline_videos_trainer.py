"""Trainer over a pipeline on rows of images, videos, both and neither: three steps, each of all rows, against a plain
loop over the stock model in one process. Ranks of the LLM fail if they decode a frame. Argument: a folder."""

import sys
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
import torch.distributed as dist
from transformers import TrainingArguments

import hf_dflop
from hf_dflop.errors import ModelError
from hf_dflop.integrations import DflopTrainer
from hf_dflop.pipeline import PipelineModel
from hf_dflop.rows import videos
from tests.distributed import pipelines as p
from tests.distributed.videos import LAYERS, MODELS_TAKE_FEATURES, model, row, stock_processor
from tests.unit.profile.test_videos import frames

FAMILY, STEPS, LEARNING_RATE = "qwen2_5_vl", 3, 1e-3


def annotated(config: Any) -> Any:
    clip, wide = frames(6), frames(4, 90, 30, seed=1)
    picture = frames(1, 60, 60, seed=3)
    rows = [
        row("A video?", [clip]), row("Only text, and of some length?"), row("Both?", [wide], picture),
        row("A picture?", images=picture), row("First, second?", [wide, clip]), row("Text?"),
        row("Again?", [wide]), row("And this?", images=picture),
    ]  # fmt: skip
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {"videos": datasets.List(datasets.List(datasets.Image())), "images": datasets.List(datasets.Image())}
    data = datasets.Dataset.from_list(rows, features=datasets.Features({**features, "messages": [turn]}))
    return hf_dflop.profile_dataset(data, stock_processor(FAMILY), config=config)[0]


def plain_loop(built: Any, rows: Any, collate: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the parameters after the last step."""
    optimizer = torch.optim.AdamW(built.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    tokens = sum(rows["dflop_label_tokens"])
    losses = []
    for _ in range(STEPS):
        loss, _ = p.stock_gradients(built, [[one] for one in rows], collate, tokens)
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(built.named_parameters())


def decodes(*_: Any, **__: Any) -> Any:
    raise AssertionError("a rank of the LLM decodes a frame")


def prepare() -> None:
    model(FAMILY, torch.float64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    p.keep_float64()
    args = TrainingArguments(
        output_dir=sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=STEPS,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=1e9, report_to=[], logging_steps=1,
        save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, ddp_timeout=60,
    )  # fmt: skip
    assert args.device.type == "cpu"  # makes the process group
    built = model(FAMILY, torch.float64)
    rows = annotated(built.config)
    collator = hf_dflop.VisionLanguageCollator(stock_processor(FAMILY))
    losses, expected = plain_loop(model(FAMILY, torch.float64), rows, p.casting(collator, torch.float64))
    plan = p.plan((1, 1, 1), layers=LAYERS, num_microbatches=4)
    trainer = DflopTrainer(PipelineModel.from_model(built, plan=plan), args, collator, train_dataset=rows)
    if not MODELS_TAKE_FEATURES:
        with pytest.raises(ModelError, match="takes no mm_encoder_outputs"):
            trainer.train()
        print("videos trainer: refused", flush=True)
        sys.exit()
    encodes = dist.get_rank() == 0
    with mock.patch.object(videos, "load_image", videos.load_image if encodes else decodes):
        trainer.train()
    told = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(told) == STEPS
    assert max(abs(a - b) for a, b in zip(told, losses, strict=True)) <= 1e-4 * losses[0], (told, losses)  # rounded
    for name, parameter in trainer.model.named_parameters():
        difference = float((parameter - expected[name]).detach().abs().max())
        # A step of AdamW moves a weight by the sign of a gradient of zero, too: key biases.
        assert difference <= 1e-9 or name.endswith(("k_proj.bias", "qkv.bias")), f"{name}: {difference:.1e}"
    print("videos trainer: exact", flush=True)
