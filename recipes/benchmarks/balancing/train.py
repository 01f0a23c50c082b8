"""Train under each sampler and collator in turn, in one invocation. Launched by the runner on every rank.

Every arm starts from the same weights and sees the same samples of a round once; each round has samples of its own,
and is repeated. Arms are interleaved, their order changes from turn to turn, and a finished run leaves a JSON behind
that is not computed again after an interruption.
"""

import argparse
import copy
import itertools
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_dflop
from hf_dflop._compat import replace_batch_sampler
from hf_dflop.cost import CostModel
from hf_dflop.integrations.stock import StockSharding
from hf_dflop.integrations.trace import read_trace
from recipes import finetune_vlm
from recipes.benchmarks.balancing.clocks import seconds_and_waiting
from recipes.benchmarks.balancing.data import load_mix
from recipes.benchmarks.balancing.model import build_bench_model
from recipes.benchmarks.balancing.settings import ARMS, MAX_TILES, Arm, BalancingSettings, rotated
from recipes.benchmarks.common.samplers import SAMPLERS, SamplerInput
from recipes.demo.compare import CountingCollator, calibrate
from recipes.demo.settings import DemoSettings, write_whole

__all__ = ["main"]


class DealtSampler:
    """Yields the microbatches of one rank, which were all dealt beforehand."""

    def __init__(self, microbatches: list[list[int]]) -> None:
        self._microbatches = microbatches
        self.batch_size: int | None = None
        self.drop_last = False

    def __len__(self) -> int:
        return len(self._microbatches)

    def __iter__(self) -> Any:
        return (list(group) for group in self._microbatches)

    def set_epoch(self, epoch: int) -> None:
        """There is one epoch."""


class CpuClock(TrainerCallback):
    """Seconds that this process really computed, by its own CPU clock: another process on the core does not count.

    A rank that waits in gloo sleeps, so that waiting does not count either. For each step: fetching and collating,
    the edges of its microbatches (the last one with the reduction of gradients and clipping), the optimizer.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._edges: list[float] = []
        self._previous = time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._previous = time.process_time()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._edges = [time.process_time()]

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._edges.append(time.process_time())

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._edges.append(time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        end = time.process_time()
        edges = self._edges
        self.steps.append(
            {
                "data": edges[0] - self._previous,
                "slots": [after - before for before, after in itertools.pairwise(edges)],
                "optimizer": end - edges[-1],
            }
        )
        self._previous = time.process_time()


class OtherSamplerCallback(hf_dflop.DflopCallback):
    """Measures like [`DflopCallback`], with the sampler of others in the place of ours."""

    def __init__(self, name: str, cost: CostModel, **kwargs: Any) -> None:
        super().__init__(balance=False, **kwargs)
        self._name = name
        assert self.shapes is not None  # no stream here
        self._llm_s = cost.llm_s(self.shapes)

    def _install(self, trainer: Any, dataloader: Any) -> Any:
        sharding = StockSharding(dataloader.batch_sampler)
        sharding.set_epoch(0)
        assert self.shapes is not None
        given = SamplerInput(
            stock=sharding.epoch_groups(),
            num_slots=trainer.args.gradient_accumulation_steps,
            tokens=self.shapes.llm_tokens,
            patches=self.shapes.image_patches,
            llm_s=self._llm_s,
            seed=trainer.args.seed,
        )
        replace_batch_sampler(dataloader, DealtSampler(SAMPLERS[self._name](given)[sharding.rank]))
        return None


def run(
    arm: Arm,
    round_: int,
    repeat: int,
    settings: BalancingSettings,
    ingredients: finetune_vlm.Ingredients,
    cost: CostModel,
) -> dict[str, Any]:
    """One training run from the initial weights; returns what the page needs."""
    folder = settings.output_dir / "runs" / f"{arm.name}-{round_}-{repeat}"
    training = TrainingArguments(output_dir=str(folder), **settings.training_arguments(arm))
    set_seed(training.seed)
    model = copy.deepcopy(ingredients.model)
    collator: Any = CountingCollator(ingredients.collator)
    counting = collator
    if arm.packed:
        collator = hf_dflop.PackedCollator(collator, model)
    common = {"dataset": ingredients.train, "trace_dir": folder / "trace"}
    callback: hf_dflop.DflopCallback
    if arm.sampler in SAMPLERS:
        callback = OtherSamplerCallback(arm.sampler, cost, **common)
    else:
        callback = hf_dflop.DflopCallback(balance=arm.sampler == "hf_dflop", cost_model=cost, **common)
    clock = CpuClock()
    trainer = Trainer(
        model=model, args=training, train_dataset=ingredients.train, data_collator=collator,
        processing_class=ingredients.processor, callbacks=[callback, counting, clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    counts = gather_object([(counting.tokens, counting.computed)])
    ranks = read_trace(folder / "trace")
    clocks = gather_object([clock.steps])
    wall = max(steps[-1]["end_s"] for steps in ranks) - min(steps[0]["begin_s"] for steps in ranks)
    idle = [log for log in trainer.state.log_history if "dflop/idle_fraction" in log]
    tokens = sum(t for t, _ in counts)
    held_out = _held_out_loss(model, ingredients) if round_ == repeat == 0 else None
    return {
        "arm": arm.name,
        "sampler": arm.sampler,
        "packed": arm.packed,
        "round": round_,
        "repeat": repeat,
        "num_samples": len(ingredients.train),
        "clocks": clocks,
        "wall_s": wall,
        "tokens": tokens,
        "padding_share": 0.0 if arm.packed else 1 - tokens / sum(c for _, c in counts),
        "waiting_by_wall_clock": sum(log["dflop/idle_fraction"] * log["dflop/step_s"] for log in idle)
        / sum(log["dflop/step_s"] for log in idle),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "held_out_loss": held_out,
        "peak_memory_bytes": max(gather_object([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])),
        "predicted_idle": _mean(trainer, "dflop/predicted_idle" if arm.sampler == "hf_dflop" else
                                "dflop/predicted_idle_stock"),
        "scheduling_s": _mean(trainer, "dflop/scheduling_s"),
        "predicted_s": [[step.get("slot_predicted_s", []) for step in steps] for steps in ranks],
    }  # fmt: skip


def _mean(trainer: Trainer, key: str) -> float | None:
    logs = [log[key] for log in trainer.state.log_history if key in log]
    return sum(logs) / len(logs) if logs else None


@torch.no_grad()
def _held_out_loss(model: Any, ingredients: finetune_vlm.Ingredients) -> float:
    """Mean loss of a label token of the held-out rows, each rank its share of them."""
    assert ingredients.evaluation is not None
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for at in range(rank, len(ingredients.evaluation), num_ranks):
        batch = ingredients.collator([ingredients.evaluation[at]])
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += torch.tensor([float(model(**batch).loss) * labels, labels], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def prepare(settings: BalancingSettings, training: TrainingArguments) -> finetune_vlm.Ingredients:
    """Model, annotated rows and collator of the mix, alike on every rank."""
    mix = settings.mix
    model, processor = build_bench_model(settings.cache, MAX_TILES[mix])
    train, held_out = load_mix(
        mix,
        processor,
        settings.cache,
        settings.num_samples * settings.num_rounds,
        settings.num_eval_samples,
        settings.seed,
    )
    with training.main_process_first(desc="annotating the rows"):
        annotated, profile = hf_dflop.profile_dataset(train, processor, config=model.config)
    annotated = annotated.add_column("length", DemoSettings.lengths(annotated))
    return finetune_vlm.Ingredients(
        model=model,
        processor=processor,
        collator=hf_dflop.VisionLanguageCollator(processor),
        train=annotated,
        evaluation=held_out,
        profile=profile,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--settings", type=Path, required=True, help="JSON of BalancingSettings")
    parser.add_argument("--arms", nargs="*", default=None, help="only these arms, such as stock hf_dflop+packed")
    arguments = parser.parse_args()
    settings = BalancingSettings.load(arguments.settings)
    arms = [arm for arm in ARMS if arguments.arms is None or arm.name in arguments.arms]
    output = settings.output_dir
    training = TrainingArguments(output_dir=str(output / "runs"), **settings.training_arguments(ARMS[0]))
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert training.world_size == expected == settings.num_ranks, (training.world_size, expected)
    rank = training.process_index
    torch.set_num_threads(1)
    ingredients = prepare(settings, training)
    path = output / "cost_model.json"
    if not path.exists():
        calibrate(ingredients, settings.num_calibration, path, rank, clock=time.process_time)
    cost = CostModel.load(path)
    rows = ingredients.train
    turns = [(round_, repeat) for round_ in range(settings.num_rounds) for repeat in range(settings.num_repeats)]
    for turn, (round_, repeat) in enumerate(turns):
        own = range(round_ * settings.num_samples, (round_ + 1) * settings.num_samples)
        ingredients.train = rows.select(own)
        for arm in rotated(arms, turn, len(turns)):
            result_path = output / "runs" / f"{arm.name}-{round_}-{repeat}.json"
            if all(gather_object([result_path.exists()])):
                continue
            start = time.monotonic()
            result = run(arm, round_, repeat, settings, ingredients, cost)
            if rank == 0:
                write_whole(result_path, json.dumps(result))
                seconds, waiting = seconds_and_waiting(result["clocks"])
                print(
                    f"[bench] {settings.mix}, run {turn + 1} of {len(turns)}, {arm.name}: "
                    f"{result['num_samples'] / seconds:.2f} samples/s, waiting {waiting:.1%}, "
                    f"padding {result['padding_share']:.0%} ({time.monotonic() - start:.1f} s)",
                    flush=True,
                )
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
