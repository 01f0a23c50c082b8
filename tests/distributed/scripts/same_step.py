"""Balanced and stock training use the same samples in every step and end with the same parameters."""

import os

import pytest
import torch
from accelerate import PartialState

from hf_dflop import DflopCallback
from hf_dflop.errors import TrainerError
from tests.distributed import tiny
from tests.distributed.every_case import EVERY_CASE
from tests.distributed.harness import parameters, relative_difference, train

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])
OPTIMIZERS: dict[str, dict[str, object]] = {
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
}


def compare(dtype: torch.dtype, optimizer: str, **arguments: object) -> tuple[float, float]:
    """Largest relative parameter difference after 20 steps, and how far training moved the parameters."""
    dataset, _ = tiny.rows(61)
    settings = {
        "max_steps": 20,
        "gradient_accumulation_steps": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        **OPTIMIZERS[optimizer],
        **arguments,
    }
    initial = {name: value.double() for name, value in tiny.model(dtype).named_parameters()}
    stock = train(dataset, [], dtype=dtype, **settings)
    # Corrected from the first steps on, so that versions change while it runs.
    callback = DflopCallback(dataset, correct=True, correct_every=3, slow_ranks="rebalance")
    balanced = train(dataset, [callback], dtype=dtype, **settings)
    versions = [log["dflop/cost_version"] for log in balanced.state.log_history if "dflop/cost_version" in log]
    assert versions[-1] > versions[0] == 0, versions
    assert stock.accelerator.num_processes == WORLD, stock.accelerator.num_processes
    assert len(stock.samples_of_steps()) == 20
    assert stock.samples_of_steps() == balanced.samples_of_steps()
    assert stock.microbatches() == balanced.microbatches()
    assert stock.noted != balanced.noted, "balancing did nothing, so nothing was tested"
    norms = [[log["grad_norm"] for log in t.state.log_history if "grad_norm" in log] for t in (stock, balanced)]
    assert max(norms[0]) > 0.5, f"clipping was never active: {norms[0]}"
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (stock, balanced)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 2e-4 * max(losses[0]), losses
    final = parameters(stock)
    return relative_difference(parameters(balanced), final), relative_difference(final, initial)


def check_that_a_bare_model_is_refused() -> None:
    """`evaluate()` before `train()` leaves the model without DDP: each rank would train its own."""
    dataset, _ = tiny.rows(16)
    if WORLD == 1:
        train(dataset, [DflopCallback(dataset)], evaluate_first=True, max_steps=1)
    else:
        with pytest.raises(TrainerError, match="eval_on_start=True"):
            train(dataset, [DflopCallback(dataset)], evaluate_first=True, max_steps=1)
        print("bare model refused")
    train(dataset, [DflopCallback(dataset)], eval_on_start=True, eval_strategy="steps", max_steps=1)


if __name__ == "__main__":
    PartialState(cpu=True)
    check_that_a_bare_model_is_refused()
    for dtype, optimizer, tolerance, ranks in (
        (torch.float32, "sgd", 1e-6, 1),
        (torch.float32, "adamw", 1e-5, 2),
        (torch.float64, "sgd", 1e-13, 2),  # rounding, and nothing else, is what differs in fp32
        (torch.float64, "adamw", 1e-13, 1),
    ):
        if ranks != WORLD and not EVERY_CASE:
            continue
        difference, moved = compare(dtype, optimizer)
        print(f"same_step {dtype} {optimizer}: relative difference {difference:.1e}, moved {moved:.1e}")
        assert moved > 1e-2, moved
        assert difference <= tolerance, (dtype, optimizer, difference)
    PartialState().destroy_process_group()
