"""What a Trainer over a pipeline does beyond its steps: metrics, predictions, the best model, the Hub.

stock FOLDER     (one process) predictions and metrics of the stock Trainer, in float64
run FOLDER       three ranks: the encoder, two replicas of the LLM
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from transformers import Trainer

import hf_dflop
from hf_dflop.errors import TrainerError
from tests.distributed import pipelines
from tests.distributed.ingredients import ingredients
from tests.distributed.scripts.pipeline_trainer import SIZE, Case, arguments, make_trainer
from tests.unit.profile.hub import hub

CASE = Case.parse("llava:1,1,2")
STEPS, SAVED, BEST = 6, 2, 4
ROWS = 9
"""That are predicted: the last microbatch is short."""
OTHERS = ["cache", "image_outputs", "past_key_values", "image_hidden_states"]
"""What the stock model gives beside logits, as versions of transformers call it."""


def logit(found: Any) -> dict[str, float]:
    """Of the right tokens, on average: a metric that no untrained model has 0 of."""
    predictions, labels = found.predictions[:, :-1], found.label_ids[:, 1:]
    rows, columns = np.nonzero(labels != -100)
    return {"logit": float(predictions[rows, columns, labels[rows, columns]].mean()), "tokens": len(rows)}


def ids(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What most people predict with: the likeliest token."""
    assert logits.shape[:2] == labels.shape
    return logits.argmax(-1)


def stock(folder: Path) -> None:
    built, rows, collator = ingredients(torch.float64)
    built.accepts_loss_kwargs = True
    rows = rows.select(range(ROWS))
    settings = {"data_collator": collator, "eval_dataset": rows, "compute_metrics": logit}
    trainer = Trainer(built, arguments(folder / "stock"), **settings)
    told = trainer.predict(rows, ignore_keys=OTHERS)
    evaluated = trainer.evaluate(ignore_keys=OTHERS)
    trainer.preprocess_logits_for_metrics, trainer.compute_metrics = ids, None
    likeliest = trainer.predict(rows, ignore_keys=OTHERS).predictions
    torch.save((told, evaluated, likeliest), folder / "stock.pt")


def predict(folder: Path) -> None:
    """Predictions, labels and metrics are those of the stock Trainer, on every rank, with the same padding."""
    told, evaluated, likeliest = torch.load(folder / "stock.pt", weights_only=False)
    args = arguments(folder / "predicted", CASE.dp)
    trainer = make_trainer(CASE, args, torch.float64, compute_metrics=logit)
    trainer.eval_dataset = trainer.eval_dataset.select(range(ROWS))
    found = trainer.predict(trainer.eval_dataset)
    assert np.array_equal(found.label_ids, told.label_ids)
    assert found.predictions.shape == told.predictions.shape
    assert np.abs(found.predictions - told.predictions).max() <= 1e-9 * np.abs(told.predictions).max()
    for name in ("test_loss", "test_logit", "test_tokens"):
        assert abs(found.metrics[name] / told.metrics[name] - 1) <= 1e-6, (name, found.metrics, told.metrics)
    again = trainer.evaluate()
    for name in ("eval_loss", "eval_logit", "eval_tokens"):
        assert abs(again[name] / evaluated[name] - 1) <= 1e-6, (name, again, evaluated)
    trainer.preprocess_logits_for_metrics, trainer.compute_metrics = ids, None
    assert np.array_equal(trainer.predict(trainer.eval_dataset).predictions, likeliest)
    trainer.data_collator = hf_dflop.PackedCollator(trainer.data_collator, ingredients(torch.float64)[0])
    with pytest.raises(TrainerError, match="packed microbatches have no row for each sample"):
        trainer.predict(trainer.eval_dataset)


def run(folder: Path) -> None:
    """Evaluated and saved every other step; the best is loaded at the end, and pushed."""
    scores = iter([0.1, 0.9, 0.5])
    args = arguments(
        folder / "run",
        CASE.dp,
        max_steps=STEPS,
        eval_strategy="steps",
        eval_steps=SAVED,
        save_strategy="steps",
        save_steps=SAVED,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        push_to_hub=True,
        hub_model_id="acme/run",
        hub_strategy="checkpoint",
        hub_token="hf_token",
        hub_always_push=True,
    )
    pushed: dict[str, bytes] = {}
    with (
        hub("acme/rows", {}, models={"acme/run": pushed}) as (endpoint, _),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch("transformers.utils.hub._hf_api", HfApi(endpoint=endpoint)),
    ):
        trainer = make_trainer(
            CASE,
            args,
            torch.float32,
            compute_metrics=lambda found: {"score": next(scores)},
            preprocess_logits_for_metrics=ids,
        )
        trainer.eval_dataset = trainer.eval_dataset.select(range(SIZE))
        trainer.train()
        trainer.push_to_hub()
    own = trainer.pipe.state_dict()
    kept = sorted(path.name for path in Path(args.output_dir).glob("*-*") if path.is_dir())
    assert kept == [f"checkpoint-{BEST}", f"checkpoint-{STEPS}"], kept
    model, _, _ = ingredients(torch.float32)

    def load(place: Path) -> dict[str, torch.Tensor]:
        return dict(type(model).from_pretrained(place, dtype=torch.float32).state_dict())

    best, last = (load(Path(args.output_dir, name)) for name in kept)
    assert all(torch.equal(value, best[name]) for name, value in own.items())
    assert not all(torch.equal(value, last[name]) for name, value in own.items())  # the check can fail
    written = [list(load_file(file)) for file in Path(args.output_dir, kept[0], "optimizer").glob("*.safetensors")]
    entries = [entry for file in written for entry in file]
    assert len(written) == args.world_size  # replicas share the writing,
    assert len(entries) == len(set(entries))  # and write nothing twice
    torch.distributed.barrier()
    if args.process_index:
        assert not pushed
        return
    repository = folder / "pushed"
    for name, content in pushed.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(content)
    for place, expected in ((repository, best), (repository / "last-checkpoint", last)):
        found = load(place)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (repository / "last-checkpoint" / "optimizer" / "groups.json").is_file()
    assert not [name for name in pushed if "saving" in name], sorted(pushed)
    print(f"evaluate: pushed {len(pushed)} files", flush=True)


def prepare() -> None:
    for dtype in (torch.float32, torch.float64):
        ingredients(dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pipelines.keep_float64()
    assert SIZE == 2
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "stock":
        stock(where)
    else:
        predict(where)
        run(where)
        torch.distributed.destroy_process_group()
