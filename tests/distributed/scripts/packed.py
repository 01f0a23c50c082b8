"""Packed and balanced training ends with the parameters of padded stock training, from the same samples per step."""

import os
from typing import Any

import torch
from accelerate import PartialState

from hf_dflop import DflopCallback, PackedCollator
from tests.distributed import tiny
from tests.distributed.harness import parameters, relative_difference, train

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])


class Counting(PackedCollator):
    """Notes the shapes of the microbatches."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        self.noted = [*getattr(self, "noted", []), tuple(batch["input_ids"].shape)]
        return batch


def compare(dtype: torch.dtype, **arguments: object) -> tuple[float, float]:
    """Relative parameter difference after 20 steps, and how far training moved the parameters."""
    dataset, _ = tiny.rows(61)
    settings = {"max_steps": 20, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5, **arguments}
    initial = {name: value.double() for name, value in tiny.model(dtype).named_parameters()}
    stock = train(dataset, [], dtype=dtype, **settings)
    model = tiny.model(dtype)
    collator = Counting(tiny.Collate(dtype), model)
    callback = DflopCallback(dataset)
    packed = train(dataset, [callback], dtype=dtype, model=model, collator=collator, **settings)
    assert stock.accelerator.num_processes == WORLD, stock.accelerator.num_processes
    assert len(stock.samples_of_steps()) == 20
    assert stock.samples_of_steps() == packed.samples_of_steps()
    assert stock.microbatches() == packed.microbatches()
    assert stock.noted != packed.noted, "balancing did nothing"
    assert {rows for rows, _ in collator.noted} == {1}
    # A joined microbatch under SDPA is predicted to cost what one sample of all its tokens would.
    sampler = callback.sampler
    assert sampler is not None
    apart = sampler.microbatch_s([0]) + sampler.microbatch_s([1]) - sampler.microbatch_s([])
    assert sampler.microbatch_s([0, 1]) > apart * (1 + 1e-6)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (stock, packed)]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 2e-4 * max(losses[0]), losses
    final = parameters(stock)
    return relative_difference(parameters(packed), final), relative_difference(final, initial)


if __name__ == "__main__":
    PartialState(cpu=True)
    sgd = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}
    for dtype, optimizer, tolerance in (
        (torch.float32, sgd, 1e-5),
        (torch.float64, sgd, 1e-12),  # rounding, and nothing else, is what differs in fp32
    ):
        difference, moved = compare(dtype, **optimizer)
        print(f"packed relative difference {difference:.1e}, moved {moved:.1e} ({dtype} {optimizer['optim']})")
        assert moved > 1e-2, moved
        assert difference <= tolerance, (dtype, optimizer, difference)
