"""Trainer over a pipeline against the stock Trainer in one process. Arguments: what to do, a folder, more.

stock FOLDER FAMILY TYPE ...     (one process) ten steps of the stock Trainer, in float32 and float64, or fp16 and bf16
train FOLDER CASE TYPE ...       the same through the pipeline, evaluated and saved; against `stock`
resume FOLDER CASE               stopped and resumed
half FOLDER CASE                 in float16 and bfloat16, with an overflow on one rank; against `stock`
die FOLDER CASE RANK WHERE       (one process) of two ranks, which torchrun's agent starts, one kills itself: at
                                 "forward" of the sixth step, or while it is being "saved"
revive FOLDER CASE               resumes what `die` left, under another plan; against `stock`

A case is FAMILY:V,PP,DP or FAMILY:PP,DP, where the encoder is on the ranks of the LLM's first stage. The last TYPE to
train in is float64.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_dflop.integrations import DflopTrainer
from hf_dflop.pipeline import PipelineModel
from hf_dflop.pipeline.skeleton import unwrap
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import pipelines
from tests.distributed.ingredients import LAYERS, ingredients

STEPS, MICROBATCHES, CALLS, SIZE = 10, 2, 2, 2
MAX_NORM = 0.5
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
HALF_STEPS = {"fp16": STEPS, "bf16": 5}
HALF: dict[str, Any] = {"fp16": ({STEPS - 2}, 2.0**14), "bf16": ({5}, None)}
"""Steps that the optimizer takes, and the last scale of the loss: it begins with 2^16, and two steps overflow."""


def arguments(folder: Path, replicas: int = 1, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": SIZE,
        "per_device_eval_batch_size": SIZE,
        "gradient_accumulation_steps": MICROBATCHES * CALLS // replicas,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": MAX_NORM,
        "warmup_steps": 2,
        "seed": 11,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "ddp_timeout": 60,
        # One process has no round of microbatches to fill up at an epoch's end.
        "accelerator_config": {"even_batches": False},
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


class Overflowing:
    """In float16 a gradient overflows in the fifth step, on one rank alone."""

    def _clip_grad_norm(self: Any, model: Any) -> Any:
        if self.args.fp16 and self.state.global_step == 4 and self.args.process_index == self.args.world_size // 2:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = float("inf")
        return super()._clip_grad_norm(model)  # type: ignore[misc]


class HalfTrainer(Overflowing, Trainer):
    """A stock Trainer; float16 on the CPU, too, where accelerate has no scaler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16:
            self.accelerator.scaler, self.accelerator.native_amp = torch.amp.GradScaler("cpu"), True


class HalfDflopTrainer(Overflowing, DflopTrainer):
    pass


def half_arguments(folder: Path, name: str) -> TrainingArguments:
    """Nothing is clipped: a norm summed in another order would move weights by a bit of float32, and those that are
    rounded to half precision by one of theirs."""
    return arguments(folder / "half", max_steps=HALF_STEPS[name], max_grad_norm=1e9, **{name: True})


def half_run(trainer: Trainer) -> Any:
    """What a run in half precision did: losses and learning rates, steps that the optimizer took, the last scale."""
    trainer.train()
    optimizer, scaler = trainer.optimizer, trainer.accelerator.scaler
    counts = {int(values["step"]) for values in optimizer.state.values()}
    lines = [(line["loss"], line["learning_rate"]) for line in trainer.state.log_history if "grad_norm" in line]
    return lines, counts, None if scaler is None else scaler.get_scale()


def stock(folder: Path, family: str, name: str) -> None:
    if name in HALF:
        built, rows, collator = ingredients(torch.float32, family)
        args = half_arguments(folder, name)
        told = half_run(HalfTrainer(built, args, train_dataset=rows, data_collator=collator))
        assert told[1:] == HALF[name], told
        torch.save((*told, built.state_dict()), folder / f"{name}.pt")
        return
    built, rows, collator = ingredients(getattr(torch, name), family)
    unwrap(built).accepts_loss_kwargs = True  # else Trainer averages the means of microbatches
    trainer = Trainer(
        built, arguments(folder / "stock"), train_dataset=rows, eval_dataset=rows, data_collator=collator
    )
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert min(norms) > MAX_NORM, norms  # clipping is at work
    found = {
        "log": trainer.state.log_history,
        "eval_loss": trainer.evaluate()["eval_loss"],
        "state": {key: value.detach() for key, value in unwrap(built).named_parameters()},
    }
    torch.save(found, folder / f"{family}-{name}.pt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A family and the ranks of its modules."""

    family: str
    vision: int
    pp: int
    dp: int
    colocated: bool = False

    @classmethod
    def parse(cls, text: str) -> "Case":
        family, _, numbers = text.partition(":")
        *vision, pp, dp = map(int, numbers.split(","))
        return cls(family=family, vision=vision[0] if vision else dp, pp=pp, dp=dp, colocated=not vision)

    def plan(self) -> Plan:
        stages = [LAYERS[self.family] // self.pp] * self.pp
        stages[0] += LAYERS[self.family] % self.pp
        return Plan(
            vision=ModulePlan(layers=(2,), dp=self.vision),
            llm=ModulePlan(layers=tuple(stages), dp=self.dp),
            num_microbatches=MICROBATCHES,
            padded=True,
            placement="colocated" if self.colocated else "disjoint",
        )


def make_trainer(
    case: Case,
    args: TrainingArguments,
    dtype: torch.dtype,
    *,
    dropout: float = 0.0,
    kind: type[DflopTrainer] = DflopTrainer,
    check: bool = False,
    **settings: Any,
) -> DflopTrainer:
    """`check`: whether the stages are tried on a small copy first; once for each case is enough."""
    assert args.device.type == "cpu"  # makes the process group
    built, rows, collator = ingredients(dtype, case.family, dropout=dropout)
    autocast = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
    # In half precision a microbatch of other samples rounds otherwise, and the balancing loss is another.
    plan = replace(case.plan(), balance=autocast is None and not case.family.endswith("moe"))
    pipe = PipelineModel.from_model(built, plan=plan, autocast=autocast, check=check)
    return kind(pipe, args, collator, train_dataset=rows, eval_dataset=rows, **settings)


def compare(trainer: DflopTrainer, folder: Path, case: Case, dtype: str, first: int = 0) -> float:
    """Largest relative difference of losses, norms, learning rates and parameters from the stock run."""
    expected = torch.load(folder / f"{case.family}-{dtype}.pt", weights_only=False)
    worst, tolerance = 0.0, TOLERANCE[dtype]
    ours = [line for line in trainer.state.log_history if "grad_norm" in line]
    theirs = [line for line in expected["log"] if "grad_norm" in line]
    assert len(ours) == len(theirs) == STEPS
    for found, wanted in zip(ours[first:], theirs[first:], strict=True):
        assert [found[key] for key in ("epoch", "learning_rate")] == [
            wanted[key] for key in ("epoch", "learning_rate")
        ]
        errors = {key: abs(found[key] / wanted[key] - 1) for key in ("loss", "grad_norm")}
        # Trainer adds up losses in float32, whatever the model's type is.
        assert errors["grad_norm"] <= tolerance, (case, dtype, wanted["step"], errors)
        assert errors["loss"] <= max(tolerance, 1e-6), (case, dtype, wanted["step"], errors)
        worst = max(worst, *errors.values())
    scale = max(float(value.abs().max()) for value in expected["state"].values())
    moved = {
        name: float((value - expected["state"][name]).abs().max()) / scale
        for name, value in trainer.pipe.named_parameters()
    }
    assert max(moved.values()) <= tolerance, (case, dtype, max((error, name) for name, error in moved.items()))
    found_eval = trainer.evaluate()["eval_loss"]
    assert abs(found_eval / expected["eval_loss"] - 1) <= max(tolerance, 1e-6), (found_eval, expected["eval_loss"])
    return pipelines.over_ranks(max(worst, *moved.values()))


def train(folder: Path, case: Case, *types: str) -> None:
    """Against the stock run; the last of the types is float64."""
    for name in types:
        args = arguments(folder / "runs", case.dp)
        trainer = make_trainer(case, args, getattr(torch, name), check=name == types[-1])
        trainer.train()
        worst = compare(trainer, folder, case, name)
        if trainer.args.process_index == 0:
            print(f"trainer: {case} {name} {worst:.1e}", flush=True)
    check_saved(trainer, folder / f"saved-{case.family}", case)


def half(folder: Path, case: Case) -> None:
    """All ranks skip the step that overflowed on one of them; else they take the steps of the stock run."""

    def run(name: str) -> float:
        *expected, state = torch.load(folder / f"{name}.pt", weights_only=False)
        args = half_arguments(folder, name)
        trainer = make_trainer(case, args, torch.float32, kind=HalfDflopTrainer, check=name == "bf16")
        found = half_run(trainer)
        scale = max(float(value.abs().max()) for value in state.values())
        moved = max(float((value - state[key]).abs().max()) / scale for key, value in trainer.pipe.named_parameters())
        return pipelines.over_ranks(moved if list(found)[1:] == expected[1:] and close(found[0], expected[0]) else 1.0)

    for name in HALF:
        moved = run(name)
        assert moved <= 1e-6, (name, moved)
        if torch.distributed.get_rank() == 0:
            print(f"trainer: {name} {moved:.1e}", flush=True)
    with mock.patch("hf_dflop.integrations.pipeline_scaler._AgreeingScaler", torch.amp.GradScaler):
        assert run("fp16") > 1e-3  # where each rank skips for itself


def close(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> bool:
    """The same losses and learning rates."""
    pairs = zip(found, expected, strict=True)
    return all(abs(loss / stock - 1) <= 1e-6 and rate == stock_rate for (loss, rate), (stock, stock_rate) in pairs)


def resume(folder: Path, case: Case) -> None:
    """Stopped in the middle of an epoch and resumed, with dropout and loader workers: bit-equal."""
    args = arguments(
        folder / f"resumed-{case.family}",
        case.dp,
        max_steps=7,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        dataloader_num_workers=1,
    )
    whole = make_trainer(case, args, torch.float32, dropout=0.2)
    whole.train()
    expected = {name: value.clone() for name, value in whole.pipe.state_dict().items()}
    again = make_trainer(case, args, torch.float32, dropout=0.2)
    again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-5")
    assert all(torch.equal(value, expected[name]) for name, value in again.pipe.state_dict().items())
    assert whole.state.log_history[-2]["loss"] == again.state.log_history[-2]["loss"]
    without = make_trainer(case, args, torch.float32)  # the check can fail
    without.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-5")
    assert not all(torch.equal(value, expected[name]) for name, value in without.pipe.state_dict().items())
    if args.process_index == 0:
        print("trainer: 5 + 2 = 7", flush=True)


def check_saved(trainer: DflopTrainer, folder: Path, case: Case) -> None:
    """Plain transformers loads what is saved, with the same parameters and logits."""
    trainer.save_model(str(folder))
    model, rows, collator = ingredients(torch.float64, case.family)
    if case.family == "lora":
        if trainer.args.process_index == 0:
            same_files(model, folder)
        stock_model, _, _ = ingredients(torch.float64)
        loaded = PeftModel.from_pretrained(stock_model, str(folder)).eval()
    else:
        eager = {"experts_implementation": "eager"} if case.family.endswith("moe") else {}  # knows float64
        loaded = type(model).from_pretrained(folder, dtype=torch.float64, **eager).eval()
        loaded = loaded.double()  # its frequencies, too, which loading leaves in float32
    state = unwrap(loaded).state_dict()
    assert all(torch.equal(state[name], value) for name, value in trainer.pipe.state_dict().items())
    pipe = trainer.pipe.eval()
    slot = next(iter(trainer.get_eval_dataloader()))
    logits = pipe.step(slot, backward=False, keep_logits=True).logits
    replica = pipe.place.replica
    picked = range(replica * SIZE, replica * SIZE + SIZE)
    with torch.no_grad():
        expected = loaded(**collator([rows[index] for index in picked])).logits
    for found in logits.values():
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def same_files(model: Any, folder: Path) -> None:
    """What was saved has the names and settings that peft itself gives them."""
    model.save_pretrained(folder / "peft")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (folder, folder / "peft"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    ours, theirs = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, folder / "peft"))
    assert ours == theirs
    assert not (folder / "model.safetensors").exists()


def kill_self(folder: Path) -> None:
    """As a crash of the machine would; the time is kept."""
    (folder / "killed" / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


class Dies(TrainerCallback):
    """Kills one rank before its sixth step."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and args.process_index == self.rank:
            kill_self(self.folder)


def die_under_torchrun(*given: Any) -> None:
    """By torchrun's own agent, but for this: ranks are forked from a process that has imported the libraries."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="die", start_method="fork", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
    )  # fmt: skip
    elastic_launch(config, die)(*given)


def die(folder: Path, case: Case, rank: int, where: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process of its own; the agent has set it for itself
    args = arguments(folder / "killed", case.dp, save_strategy="steps", save_steps=2)
    callbacks = [Dies(rank, folder)] if where == "forward" else []
    trainer = make_trainer(case, args, torch.float32, callbacks=callbacks)
    if where == "save":
        write = trainer._save_rng_state

        def torn(output_dir: str) -> None:
            if trainer.state.global_step == 6 and args.process_index == rank:
                kill_self(folder)
            write(output_dir)

        trainer._save_rng_state = torn  # type: ignore[method-assign]
    trainer.train()


def revive(folder: Path, case: Case) -> None:
    args = arguments(folder / "killed", case.dp, save_strategy="no")
    newest = get_last_checkpoint(args.output_dir)
    assert str(newest).endswith("checkpoint-4"), newest
    trainer = make_trainer(case, args, torch.float32)
    trainer.train(resume_from_checkpoint=newest)
    assert not list(Path(args.output_dir).glob("_saving-*"))
    worst = compare(trainer, folder, case, "float32", first=4)
    if args.process_index == 0:
        print(f"trainer: revived {case} {worst:.1e}", flush=True)


def prepare() -> None:
    for name in sys.argv[4:] if sys.argv[1] == "train" else ["float32"]:
        ingredients(getattr(torch, name), Case.parse(sys.argv[3]).family)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, which, rest = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    if what != "half" and not HALF.keys() & rest:  # a scaler wants its float32
        pipelines.keep_float64()
    if what == "stock":
        for name in rest:
            stock(where, which, name)
    elif what == "die":
        die_under_torchrun(where, Case.parse(which), int(rest[0]), rest[1])
    else:
        {"train": train, "half": half, "resume": resume, "revive": revive}[what](where, Case.parse(which), *rest)
        torch.distributed.destroy_process_group()
