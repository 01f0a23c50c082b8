"""Trainer over a pipeline with tensor parallelism against the stock Trainer; stopped and resumed, with other degrees.

stock FOLDER     (one process) the stock Trainer's run, in float64
train FOLDER     three ranks: the encoder, the LLM on two
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_dflop.integrations import DflopTrainer
from hf_dflop.pipeline import PipelineModel
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import pipelines
from tests.distributed.ingredients import ingredients
from tests.distributed.scripts.pipeline_trainer import CALLS, MICROBATCHES, arguments

STEPS, SAVED = 4, 2


def few_lengths(dtype: torch.dtype, *, dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """Model, rows of four lengths, collator: DTensor works out anew for each shape how operators share their work."""
    built, rows, collator = ingredients(dtype, dropout=dropout)
    return built, rows.select([index % 4 for index in range(len(rows))]), collator


def run_arguments(folder: Path, **settings: Any) -> Any:
    return arguments(folder, **({"max_steps": STEPS} | settings))


def stock(folder: Path) -> None:
    built, rows, collator = few_lengths(torch.float64)
    trainer = Trainer(built, run_arguments(folder / "stock"), train_dataset=rows, data_collator=collator)
    trainer.train()
    found = {"log": logged(trainer), "state": {name: value.detach() for name, value in built.named_parameters()}}
    torch.save(found, folder / "stock.pt")


def logged(trainer: Any) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]


def make_trainer(
    args: Any, *, tp: int, layers: tuple[int, ...] = (2,), check: bool = False, dropout: float = 0.0
) -> DflopTrainer:
    assert args.device.type == "cpu"  # makes the process group
    plan = Plan(
        vision=ModulePlan(layers=(2,)),
        llm=ModulePlan(layers=layers, tp=tp),
        num_microbatches=MICROBATCHES,
        padded=True,
    )
    built, rows, collator = few_lengths(torch.float64, dropout=dropout)
    pipe = PipelineModel.from_model(built, plan=plan, check=check)
    return DflopTrainer(pipe, args, collator, train_dataset=rows, eval_dataset=rows)


def compare(trainer: DflopTrainer, folder: Path, tolerance: float, first: int = 0) -> float:
    """Largest relative difference of norms and parameters from the stock run; losses are added up in float32."""
    expected = torch.load(folder / "stock.pt", weights_only=False)
    ours, theirs = logged(trainer)[first:], expected["log"][first:]
    assert len(ours) == STEPS - first == len(theirs)
    assert all(abs(found[0] / wanted[0] - 1) <= 1e-6 for found, wanted in zip(ours, theirs, strict=True)), (
        ours,
        theirs,
    )
    worst = max(abs(found[1] / wanted[1] - 1) for found, wanted in zip(ours, theirs, strict=True))
    scale = max(float(value.abs().max()) for value in expected["state"].values())
    for name, value in trainer.pipe.named_parameters():
        found = trainer.pipe.whole(name, value.detach())
        worst = max(worst, float((found - expected["state"][name]).abs().max()) / scale)
    assert worst <= tolerance, worst
    return pipelines.over_ranks(worst)


def train(folder: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    args = run_arguments(folder / "tensor", **saving)
    trainer = make_trainer(args, tp=2, check=True)
    trainer.train()
    told = {"tp=2": compare(trainer, folder, 1e-9)}
    check_saved(trainer, folder / "saved")
    checkpoint = folder / "tensor" / f"checkpoint-{SAVED}"
    again = make_trainer(args, tp=2)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(again.pipe.parameters(), trainer.pipe.parameters(), strict=True))
    assert logged(again)[-1] == logged(trainer)[-1]
    other = make_trainer(run_arguments(folder / "other"), tp=1, layers=(1, 1))
    other.train(resume_from_checkpoint=str(checkpoint))
    told["resumed in two stages of tp=1"] = compare(other, folder, 1e-9, SAVED)
    dropped = make_trainer(run_arguments(folder / "dropout", max_steps=1), tp=2, dropout=0.2)
    torch.rand(dropped.args.process_index)  # ranks whose random numbers differ
    dropped.train()
    check_same_random(dropped)
    if args.process_index == 0:
        print(f"trainer: {told}", flush=True)


def check_same_random(trainer: DflopTrainer) -> None:
    """Both tensor-parallel ranks have drawn the same numbers, though they began with others."""
    if trainer.pipe.shards is not None:
        drawn = [torch.empty(1) for _ in range(2)]
        torch.distributed.all_gather(drawn, torch.rand(1), group=trainer.pipe._tensor_group)
        assert torch.equal(*drawn), drawn


def check_saved(trainer: DflopTrainer, folder: Path) -> None:
    """Plain transformers loads what is saved, with the same parameters and logits."""
    trainer.save_model(str(folder))
    model, rows, collator = few_lengths(torch.float64)
    loaded = type(model).from_pretrained(folder, dtype=torch.float64).double().eval()  # its frequencies, too
    state, pipe = loaded.state_dict(), trainer.pipe
    assert all(torch.equal(state[name], pipe.whole(name, value)) for name, value in pipe.state_dict().items())
    pipe.eval()
    logits = pipe.step(next(iter(trainer.get_eval_dataloader())), backward=False, keep_logits=True).logits
    pipe.train()
    assert bool(logits) == (pipe.place.rank == 1)
    with torch.no_grad():
        expected = loaded(**collator([rows[index] for index in range(2)])).logits
    for found in logits.values():
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def prepare() -> None:
    ingredients(torch.float64)


if __name__ == "__main__":
    assert CALLS > 1  # gradients are accumulated
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "stock":
        stock(where)
    else:
        train(where)
        torch.distributed.destroy_process_group()
