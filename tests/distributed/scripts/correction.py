"""Correction in a real run: costs wrong by 2 in one module, a slow rank, and a resume between two versions.

Without arguments the clock of the timer is one that only microbatches move, by what they truly cost: the run is real,
and a busy machine does not change what is measured. With `MEAN_S STEPS`, time is real, and a microbatch is filled up
with sleep to its true cost: for a machine with nothing else to do.
"""

import json
import logging
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_dflop import CostModel, DflopCallback, ModelSpec
from hf_dflop.data.versions import CostVersions
from hf_dflop.integrations import timing
from hf_dflop.integrations.correction import KEY
from tests.distributed import harness, tiny

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
DATASET, SHAPES = tiny.two_kinds(900)
SPEC = ModelSpec.from_config(tiny.model().config)
UNIT = CostModel.analytic(SPEC)
SIZE, SLOTS = 6, 1


def costs(mean_s: float, vision_speed: float = 1.0) -> CostModel:
    """Half of a microbatch's `mean_s` is vision; `vision_speed` 2: believed to take half of what it takes."""
    return CostModel.analytic(
        SPEC,
        vision_flops_per_s=2e12 * UNIT.vision_s(SHAPES).mean() * SIZE / mean_s * vision_speed,
        llm_flops_per_s=2e12 * UNIT.llm_s(SHAPES).mean() * SIZE / mean_s,
    )


class Clock:
    """Stands in for the timer's clock; every microbatch moves it."""

    seconds_now = 0.0

    def __init__(self, device: Any) -> None:
        pass

    def now(self) -> float:
        return Clock.seconds_now

    def seconds(self, moment: float) -> float:
        return moment


class Sleeper(harness.NotingTrainer):
    """A microbatch takes what it truly costs on this rank, 3 % of noise included."""

    truth: CostVersions
    slowness: float
    noise = np.random.default_rng(3 + int(os.environ.get("RANK", 0)))
    is_real = False
    seconds: float

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seconds = self.truth.module_seconds([inputs["sample_ids"].tolist()], self.truth.newest).sum()
        self.seconds = float(seconds) * self.slowness * float(self.noise.lognormal(0, 0.03))
        Clock.seconds_now += self.seconds
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        loss = super().compute_loss(*args, **kwargs)
        if self.is_real:  # the backward to come takes about twice the forward
            time.sleep(max(0.0, self.seconds - 3 * (time.perf_counter() - begin)))
        return loss


def run(believed: CostModel, mean_s: float, *, slowness: float = 1.0, resume: str | None = None, steps: int,
        trainer_arguments: dict[str, Any] | None = None, **options: Any) -> Any:  # fmt: skip
    callback = DflopCallback(DATASET, cost_model=believed, **options)
    Sleeper.truth = CostVersions(SHAPES, costs(mean_s), padded=True)
    Sleeper.slowness = slowness if PartialState().process_index == WORLD - 1 else 1.0
    trainer = harness.train(
        DATASET, [callback], max_steps=steps, per_device_train_batch_size=SIZE, resume=resume, trainer_class=Sleeper,
        gradient_accumulation_steps=SLOTS, **(trainer_arguments or {}),
    )  # fmt: skip
    assert trainer.accelerator.num_processes == WORLD
    return trainer


def true_idle(trainer: Any, last: int, slowness: float = 1.0) -> float:
    """Mean share of the last steps' true seconds that the mean rank waits, from the microbatches that ran."""
    from accelerate.utils import gather_object

    seconds: dict[tuple[int, int], float] = {}
    rank = trainer.accelerator.process_index
    for r, step, ids in gather_object([(rank, step, ids) for step, ids in trainer.noted]):
        found = Sleeper.truth.module_seconds([ids], Sleeper.truth.newest).sum()
        seconds[step, r] = seconds.get((step, r), 0.0) + float(found) * (slowness if r == WORLD - 1 else 1.0)
    steps = sorted({step for step, _ in seconds})[-last:]
    table = np.array([[seconds[step, r] for r in range(WORLD)] for step in steps])
    return float(np.mean(1 - table.mean(axis=1) / table.max(axis=1)))


def measured_idle(trainer: Any, last: int) -> float:
    logs = [log["dflop/idle_fraction"] for log in trainer.state.log_history if "dflop/idle_fraction" in log]
    return float(np.mean(logs[-last:]))


def check_wrong_costs(mean_s: float, steps: int) -> None:
    wrong = run(costs(mean_s, 2.0), mean_s, steps=steps, correct=False)
    oracle = run(costs(mean_s), mean_s, steps=steps, correct=False)
    fixed = run(costs(mean_s, 2.0), mean_s, steps=steps, correct_every=5)
    last = steps // 3
    true = {name: true_idle(t, last) for name, t in (("wrong", wrong), ("oracle", oracle), ("corrected", fixed))}
    measured = {
        name: measured_idle(t, last) for name, t in (("wrong", wrong), ("oracle", oracle), ("corrected", fixed))
    }
    assert fixed.samples_of_steps() == wrong.samples_of_steps() == oracle.samples_of_steps()
    versions = [int(log["dflop/cost_version"]) for log in fixed.state.log_history if "dflop/cost_version" in log]
    print(f"wrong costs: last {last} of {steps} steps, waiting by true costs {true}, by the clock {measured}")
    assert versions[-1] >= 1
    assert true["wrong"] > true["oracle"] + 0.04, true
    assert true["corrected"] <= true["oracle"] + 0.03, true
    assert true["corrected"] < (true["wrong"] + true["oracle"]) / 2, true


def check_slow_rank(mean_s: float, steps: int) -> None:
    named = run(costs(mean_s), mean_s, steps=steps, slowness=1.3, correct_every=5)
    balanced = run(costs(mean_s), mean_s, steps=steps, slowness=1.3, correct_every=5, slow_ranks="rebalance")
    last = steps // 3
    before, after = true_idle(named, last, 1.3), true_idle(balanced, last, 1.3)
    if Sleeper.is_real:
        before, after = measured_idle(named, last), measured_idle(balanced, last)
    slow = [log.get("dflop/slow_rank") for log in named.state.log_history if "dflop/cost_version" in log]
    print(f"slow rank: waiting {before:.3f} named, {after:.3f} rebalanced; named as {slow[-1]}")
    assert slow[-1] == WORLD - 1, slow
    assert before > 0.06, before
    assert after <= before / 2, (before, after)
    assert balanced.samples_of_steps() == named.samples_of_steps()


def check_resume(mean_s: float) -> None:
    """Stop where a version is declared but not yet in force; the steps until the next look are the uninterrupted's."""
    holder = [tempfile.mkdtemp()]
    broadcast_object_list(holder)
    options: dict[str, Any] = {"correct_every": 6, "steps": 18}
    workers = {"dataloader_num_workers": 1}
    saving = {"output_dir": holder[0], "save_strategy": "steps", "save_steps": 6} | workers
    whole = run(costs(mean_s, 2.0), mean_s, trainer_arguments=saving, **options)
    checkpoint = f"{holder[0]}/checkpoint-6"
    with open(f"{checkpoint}/trainer_state.json", encoding="utf-8") as file:
        kept = json.load(file)["stateful_callbacks"][KEY]["attributes"]["versions"]
    assert [version["number"] for version in kept] == [0, 1]
    assert 6 < kept[1]["from_step"] < 18, kept[1]["from_step"]
    resumed = run(costs(mean_s, 2.0), mean_s, resume=checkpoint, trainer_arguments=workers, **options)
    assert resumed.noted == [entry for entry in whole.noted if entry[0] >= 6]
    logged = [log["dflop/cost_version"] for log in resumed.state.log_history if log["step"] in (7, 11) and
              "dflop/cost_version" in log]  # fmt: skip
    assert set(logged) == {1.0}, logged
    print("resumed between two versions: the same microbatches")


if __name__ == "__main__":
    logging.basicConfig()
    logging.getLogger("hf_dflop").setLevel(logging.INFO)
    PartialState(cpu=True)
    Sleeper.is_real = len(sys.argv) > 2
    MEAN_S, STEPS = (float(sys.argv[1]), int(sys.argv[2])) if Sleeper.is_real else (0.1, 36)
    if not Sleeper.is_real:
        timing.DeviceClock = Clock  # type: ignore[assignment, misc]
    check_resume(0.01)
    check_wrong_costs(MEAN_S, STEPS)
    check_slow_rank(MEAN_S, STEPS)
    PartialState().destroy_process_group()
