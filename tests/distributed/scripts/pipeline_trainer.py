"""Trainer over a pipeline against the stock Trainer in one process. Arguments: what to do, a folder, more.

stock FOLDER                     (one process) ten steps of the stock Trainer, in float32 and float64
train FOLDER V,PP,DP             the same through the pipeline; saved, resumed, evaluated; against `stock`
die FOLDER V,PP,DP RANK WHERE    one rank kills itself: at "forward" of the sixth step, or while it is being "saved"
revive FOLDER V,PP,DP            resumes what `die` left, under another plan; against `stock`
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import hf_dflop
from hf_dflop.integrations import DflopTrainer
from hf_dflop.pipeline import PipelineModel
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import chats, pipelines

STEPS, MICROBATCHES, CALLS, SIZE = 10, 2, 2, 2
MAX_NORM = 0.5


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
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


def ingredients(dtype: torch.dtype, *, dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """Model, annotated rows (27: an epoch is four steps, and the last is short), collator."""
    processor = chats.chat_processor()
    built = chats.model(processor).to(dtype)
    for module in built.model.language_model.layers:
        module.self_attn.attention_dropout = dropout
    rows, _ = hf_dflop.profile_dataset(chats.conversations(27, with_images=0.7), processor, config=built.config)
    return built, rows, hf_dflop.VisionLanguageCollator(processor)


def stock(folder: Path) -> None:
    found = {}
    for name in ("float32", "float64"):
        built, rows, collator = ingredients(getattr(torch, name))
        trainer = Trainer(
            built, arguments(folder / "stock"), train_dataset=rows, eval_dataset=rows, data_collator=collator
        )
        trainer.train()
        norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        assert min(norms) > MAX_NORM, norms  # clipping is at work
        found[name] = {
            "log": trainer.state.log_history,
            "eval_loss": trainer.evaluate()["eval_loss"],
            "state": {key: value.detach() for key, value in built.named_parameters()},
        }
    torch.save(found, folder / "stock.pt")


def make_trainer(
    layout: pipelines.Layout, args: TrainingArguments, dtype: torch.dtype, *, dropout: float = 0.0, **settings: Any
) -> DflopTrainer:
    assert args.device.type == "cpu"  # makes the process group
    vision, pp, dp = layout
    plan = Plan(
        vision=ModulePlan(layers=(2,), dp=vision),
        llm=ModulePlan(layers=(1, 1) if pp == 2 else (2,), dp=dp),
        num_microbatches=MICROBATCHES,
        padded=True,
    )
    built, rows, collator = ingredients(dtype, dropout=dropout)
    pipe = PipelineModel.from_model(built, plan=plan)
    return DflopTrainer(pipe, args, collator, train_dataset=rows, eval_dataset=rows, **settings)


def compare(trainer: DflopTrainer, folder: Path, dtype: str, tolerance: float, first: int = 0) -> float:
    """Largest relative difference of losses, norms, learning rates and parameters from the stock run."""
    expected = torch.load(folder / "stock.pt", weights_only=False)[dtype]
    worst = 0.0
    ours = [line for line in trainer.state.log_history if "grad_norm" in line]
    theirs = [line for line in expected["log"] if "grad_norm" in line]
    assert len(ours) == len(theirs) == STEPS
    for found, wanted in zip(ours[first:], theirs[first:], strict=True):
        assert [found[key] for key in ("epoch", "learning_rate")] == [
            wanted[key] for key in ("epoch", "learning_rate")
        ]
        errors = {key: abs(found[key] / wanted[key] - 1) for key in ("loss", "grad_norm")}
        # Trainer adds up losses in float32, whatever the model's type is.
        assert errors["grad_norm"] <= tolerance, (dtype, wanted["step"], errors)
        assert errors["loss"] <= max(tolerance, 1e-6), (dtype, wanted["step"], errors)
        worst = max(worst, *errors.values())
    scale = max(float(value.abs().max()) for value in expected["state"].values())
    moved = max(
        float((value - expected["state"][name]).abs().max()) / scale for name, value in trainer.pipe.named_parameters()
    )
    assert moved <= tolerance, (dtype, moved)
    found_eval = trainer.evaluate()["eval_loss"]
    assert abs(found_eval / expected["eval_loss"] - 1) <= max(tolerance, 1e-6), (found_eval, expected["eval_loss"])
    return pipelines.over_ranks(max(worst, moved))


def train(folder: Path, layout: pipelines.Layout) -> None:
    """Against the stock run; then saved and loaded, stopped and resumed."""
    for name, tolerance in (("float32", 1e-5), ("float64", 1e-9)):
        trainer = make_trainer(layout, arguments(folder / name, layout[2]), getattr(torch, name))
        trainer.train()
        worst = compare(trainer, folder, name, tolerance)
        if trainer.args.process_index == 0:
            print(f"trainer: {layout} {name} {worst:.1e}", flush=True)
    check_saved(trainer, folder / "saved")
    resume(folder, layout)
    if trainer.args.process_index == 0:
        print("trainer: 5 + 5 = 10", flush=True)


def resume(folder: Path, layout: pipelines.Layout) -> None:
    """Stopped in the middle of an epoch and resumed, with dropout and loader workers: bit-equal."""
    args = arguments(
        folder / "resumed",
        layout[2],
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        dataloader_num_workers=1,
    )
    whole = make_trainer(layout, args, torch.float32, dropout=0.2)
    whole.train()
    expected = {name: value.clone() for name, value in whole.pipe.state_dict().items()}
    again = make_trainer(layout, args, torch.float32, dropout=0.2)
    again.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-5"))
    assert all(torch.equal(value, expected[name]) for name, value in again.pipe.state_dict().items())
    assert whole.state.log_history[-2]["loss"] == again.state.log_history[-2]["loss"]
    without = make_trainer(layout, args, torch.float32)  # the check can fail
    without.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-5"))
    assert not all(torch.equal(value, expected[name]) for name, value in without.pipe.state_dict().items())


def check_saved(trainer: DflopTrainer, folder: Path) -> None:
    """Plain transformers loads what is saved, with the same parameters and logits."""
    trainer.save_model(str(folder))
    model, rows, collator = ingredients(torch.float64)
    loaded = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    state = loaded.state_dict()
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


def die(folder: Path, layout: pipelines.Layout, rank: int, where: str) -> None:
    args = arguments(folder / "killed", layout[2], save_strategy="steps", save_steps=2)
    callbacks = [Dies(rank, folder)] if where == "forward" else []
    trainer = make_trainer(layout, args, torch.float32, callbacks=callbacks)
    if where == "save":
        write = trainer._save_rng_state

        def torn(output_dir: str) -> None:
            if trainer.state.global_step == 6 and args.process_index == rank:
                kill_self(folder)
            write(output_dir)

        trainer._save_rng_state = torn  # type: ignore[method-assign]
    trainer.train()


def revive(folder: Path, layout: pipelines.Layout) -> None:
    args = arguments(folder / "killed", layout[2], save_strategy="no")
    newest = get_last_checkpoint(args.output_dir)
    assert str(newest).endswith("checkpoint-4"), newest
    trainer = make_trainer(layout, args, torch.float32)
    trainer.train(resume_from_checkpoint=newest)
    assert not list(Path(args.output_dir).glob(".saving-*"))
    worst = compare(trainer, folder, "float32", 1e-5, first=4)
    if args.process_index == 0:
        print(f"trainer: revived {layout} {worst:.1e}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "stock":
        stock(where)
    else:
        layout: Any = tuple(map(int, sys.argv[3].split(",")))
        if what == "die":
            die(where, layout, int(sys.argv[4]), sys.argv[5])
        else:
            {"train": train, "resume": resume, "revive": revive}[what](where, layout)
        torch.distributed.destroy_process_group()
