"""Packed training under a stock Trainer: evaluations pad, dummy images and adapters fit in."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from hf_dflop import DflopCallback, PackedCollator
from hf_dflop.errors import TrainerError
from hf_dflop.integrations.checks import adds_dummy_images
from tests.distributed import tiny
from tests.distributed.harness import train


class Noting(PackedCollator):
    """Notes how many rows the microbatches have."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        self.rows = [*getattr(self, "rows", []), len(batch["input_ids"])]
        return batch


def test_an_evaluation_gets_a_row_per_sample_before_during_and_after_training() -> None:
    dataset, _ = tiny.rows(16)
    model = tiny.model()
    collator = Noting(tiny.Collate(), model)
    trainer = train(
        dataset, [DflopCallback(dataset)], model=model, collator=collator, max_steps=2, eval_strategy="steps",
        eval_steps=1, eval_on_start=True, evaluate_first=True,
    )  # fmt: skip
    assert set(collator.rows) == {1}
    before = len(collator.rows)
    trainer.predict(dataset)
    assert len(collator.rows) == before
    trainer.args.max_steps = 4
    trainer.train()
    assert len(collator.rows) > before
    assert set(collator.rows) == {1}
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert np.isfinite(losses).all()


def test_it_is_the_evaluation_of_padded_training() -> None:
    dataset, _ = tiny.rows(16)
    losses = []
    for packed in (False, True):
        model = tiny.model()
        collator: Any = tiny.Collate()
        trainer = train(
            dataset, [DflopCallback(dataset, balance=False)], model=model, max_steps=1,
            collator=PackedCollator(collator, model) if packed else collator, learning_rate=0.0,
        )  # fmt: skip
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_dummy_of_a_packed_row_is_seen() -> None:
    dataset, shapes = tiny.rows(16)
    bare = int(np.flatnonzero(shapes.num_images == 0)[0])

    class Loader:
        def __init__(self, collate_fn: Any) -> None:
            self.dataset, self.collate_fn = dataset, collate_fn

    padding = tiny.Collate(dummy=True)
    for collate in (padding, PackedCollator(padding, tiny.model())):
        assert adds_dummy_images(Loader(collate), shapes, tiny.IMAGE_TOKEN) == tiny.PATCHES + 1
    assert adds_dummy_images(Loader(tiny.Collate()), shapes, tiny.IMAGE_TOKEN) == 0
    assert (PackedCollator(padding, tiny.model())([dataset[bare]])["labels"][0, -5:] == -100).all()
    heard = replace(shapes, num_audios=np.arange(len(shapes)) % 2)
    assert adds_dummy_images(Loader(tiny.Collate()), heard, tiny.IMAGE_TOKEN) == 0
    with pytest.raises(TrainerError, match=r"a dummy would not be told from a step without images.*dummy_image=False"):
        adds_dummy_images(Loader(padding), heard, tiny.IMAGE_TOKEN)


def test_packed_rows_with_dummies_under_adapters_train() -> None:
    dataset, _ = tiny.rows(16)
    adapted = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj", "linear_1"]))
    collator = PackedCollator(tiny.Collate(dummy=True), adapted)
    trainer = train(dataset, [DflopCallback(dataset)], model=adapted, collator=collator, max_steps=2)
    assert trainer.state.global_step == 2
