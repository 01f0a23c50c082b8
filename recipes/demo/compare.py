"""Train the demo's model under each sampler, in turn, in one invocation. Launched by `recipes.demo` on every rank.

Every arm starts from the same weights and sees the same samples once. Arms are interleaved, their order rotates from
round to round, and a finished run leaves a JSON behind that is not computed again after an interruption.
"""

import argparse
import copy
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments, set_seed

from hf_dflop.cost import CostModel, ModelSpec, Observation, Trainable
from hf_dflop.integrations.trace import read_trace
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes
from recipes import finetune_vlm
from recipes.demo.loss import fuse_loss
from recipes.demo.settings import ARMS, OWN_ARMS, DemoSettings, write_whole

__all__ = ["main"]


class CountingCollator(TrainerCallback):
    """Counts what a padding collator computes in training, and what of it is padding.

    Rows of the evaluation have no shape columns and are not counted; what is collated before training begins (the
    check of a few samples) is forgotten when it does.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens = 0
        self.computed = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        if SHAPE_COLUMNS[0] in rows[0]:
            self.tokens += int(batch["attention_mask"].sum())
            self.computed += int(batch["attention_mask"].numel())
        return batch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tokens = self.computed = 0


def observe(
    ingredients: finetune_vlm.Ingredients, count: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[list[int], float]]:
    """Samples and seconds of `count` real microbatches, the same ones whenever and wherever it is called."""
    shapes = Shapes.of_dataset(ingredients.train)
    model = copy.deepcopy(ingredients.model).train()
    draft = CostModel.analytic(ModelSpec.from_config(model.config), causal_factor=1.0)
    # From the cheapest to the costliest sample, in a mixed order, one or two in a microbatch; one more to warm up.
    by_cost = np.argsort(draft.sample_seconds(shapes).sum(axis=1))
    spread = np.linspace(0, len(shapes) - 2, count + 1).astype(int)
    spread = np.random.default_rng(1).permutation(spread)
    observed = []
    for turn, place in enumerate(spread):
        picked = by_cost[place : place + 1 + turn % 2].tolist()
        batch = ingredients.collator([ingredients.train[i] for i in picked])
        start = clock()
        model(**batch).loss.backward()
        seconds = clock() - start
        if turn > 0:
            observed.append((picked, seconds))
        model.zero_grad()
    return observed


def fit(ingredients: finetune_vlm.Ingredients, observed: list[tuple[list[int], float]]) -> CostModel:
    """The cost model of what `observe` gave."""
    shapes = Shapes.of_dataset(ingredients.train)
    observations = [
        Observation(shapes=shapes.select(picked), padded=True, seconds=seconds) for picked, seconds in observed
    ]
    spec = ModelSpec.from_config(ingredients.model.config)
    return CostModel.fit(spec, observations, trainable=Trainable(), causal_factor=1.0)


def calibrate(
    ingredients: finetune_vlm.Ingredients,
    count: int,
    path: Path,
    rank: int,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Measure `count` real microbatches (every rank the same ones at the same time), fit, save and return."""
    observed = observe(ingredients, count, clock)
    if rank == 0:
        write_whole(path, fit(ingredients, observed).to_json())
    torch.distributed.barrier()
    return CostModel.load(path)


def run(
    arm: str, round_: int, settings: DemoSettings, ingredients: finetune_vlm.Ingredients, training: TrainingArguments
) -> dict[str, Any]:
    """One training run from the initial weights; returns what the report needs."""
    folder = Path(training.output_dir)
    recipe = finetune_vlm.RecipeArguments(
        balance="on" if arm in OWN_ARMS else "off",
        packing="on" if arm == "packed" else "off",
        cost_model=str(settings.output_dir / "cost_model.json"),
        trace_dir=str(folder / "trace"),
    )
    set_seed(training.seed)
    collator = CountingCollator(ingredients.collator)
    own = copy.copy(ingredients)
    own.model = copy.deepcopy(ingredients.model)
    own.collator = collator
    evaluated = round_ == 0 and arm in ("stock", "balanced")
    training.eval_on_start = evaluated
    trainer = finetune_vlm.build_trainer(recipe, training, own)
    trainer.add_callback(collator)
    ignored = finetune_vlm.outputs_but_logits(own.model)
    trainer.train(ignore_keys_for_eval=ignored)
    counts = gather_object([(collator.tokens, collator.computed)])
    before = _first_evaluation(trainer.state.log_history) if evaluated else {}
    after = trainer.evaluate(metric_key_prefix="after", ignore_keys=ignored) if evaluated else {}
    peaks = gather_object([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
    ranks = read_trace(folder / "trace")
    seconds = max(steps[-1]["end_s"] for steps in ranks) - min(steps[0]["begin_s"] for steps in ranks)
    history = trainer.state.log_history
    return {
        "arm": arm,
        "round": round_,
        "num_ranks": len(ranks),
        "num_steps": len(ranks[0]),
        "num_samples": len(ingredients.train),
        "seconds": seconds,
        "samples_per_s": len(ingredients.train) / seconds,
        "tokens_per_s": sum(tokens for tokens, _ in counts) / seconds,
        "padding_share": 0.0 if arm == "packed" else 1 - sum(t for t, _ in counts) / sum(c for _, c in counts),
        "idle_fraction": _mean_idle(history),
        "losses": [log["loss"] for log in history if "loss" in log],
        "grad_norms": [log["grad_norm"] for log in history if "grad_norm" in log],
        "logs": [log for log in history if "dflop/step_s" in log],
        "evaluation": {**before, **after},
        "peak_memory_bytes": peaks,
        "ranks": ranks,
    }


def _first_evaluation(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation at step 0, its keys renamed from `eval_` to `before_`."""
    first = next(log for log in history if "eval_loss" in log)
    return {name.replace("eval_", "before_", 1): value for name, value in first.items()}


def _mean_idle(history: list[dict[str, Any]]) -> float:
    """Idle share of the whole run: waiting seconds ÷ step seconds, over its steps."""
    logs = [log for log in history if "dflop/idle_fraction" in log]
    waited = sum(log["dflop/idle_fraction"] * log["dflop/step_s"] for log in logs)
    return waited / sum(log["dflop/step_s"] for log in logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--settings", type=Path, required=True, help="JSON of DemoSettings")
    settings = DemoSettings.load(parser.parse_args().settings)
    output = settings.output_dir
    training = TrainingArguments(output_dir=str(output / "runs"), **settings.training_arguments("stock"))
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert training.world_size == expected == settings.num_ranks, (training.world_size, expected)
    rank = training.process_index
    torch.set_num_threads(1)
    recipe = finetune_vlm.RecipeArguments(
        eval_split="eval", freeze=["embeddings"], demo_cache=str(settings.cache), dtype="float32"
    )
    ingredients = finetune_vlm.prepare(recipe, training)
    fuse_loss(ingredients.model)
    assert ingredients.evaluation is not None
    ingredients.evaluation = ingredients.evaluation.select(
        range(min(settings.num_eval_samples, len(ingredients.evaluation)))
    )
    path = output / "cost_model.json"
    if not path.exists():
        if rank == 0:
            print(f"[demo] measuring {settings.num_calibration} microbatches to fit the cost model", flush=True)
        calibrate(ingredients, settings.num_calibration, path, rank)
    if rank == 0:
        settings.paced(Shapes.of_dataset(ingredients.train), CostModel.load(path))
    torch.distributed.barrier()
    settings = settings.paced()
    if rank == 0:
        print(f"[demo] {settings.num_steps} steps a run, at this machine's pace", flush=True)
    train = ingredients.train.select(range(settings.num_samples))
    ingredients.train = train.add_column("length", settings.lengths(train))
    for round_ in range(settings.num_rounds):
        for arm in ARMS[round_ % len(ARMS) :] + ARMS[: round_ % len(ARMS)]:
            result_path = output / "runs" / f"{arm}-{round_}.json"
            done = gather_object([result_path.exists()])
            if all(done):
                continue
            if rank == 0:
                print(f"[demo] round {round_ + 1} of {settings.num_rounds}: {arm}", flush=True)
            training = TrainingArguments(
                output_dir=str(output / "runs" / f"{arm}-{round_}"), **settings.training_arguments(arm)
            )
            result = run(arm, round_, settings, ingredients, training)
            if rank == 0:
                write_whole(result_path, json.dumps(result))
                print(
                    f"[demo]   {result['samples_per_s']:.2f} samples/s, waiting {result['idle_fraction']:.1%}, "
                    f"padding {result['padding_share']:.0%}",
                    flush=True,
                )
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
