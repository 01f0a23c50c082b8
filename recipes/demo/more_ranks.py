"""The demo's documents on more ranks than the machine has: throughput ÷ stock, by the measured cost model."""

import numpy as np

from hf_dflop.cost import CostModel
from hf_dflop.shapes import Shapes
from recipes.benchmarks.scale.simulate import SIMULATED, Epoch, efficiency
from recipes.demo.settings import DemoSettings

__all__ = ["simulate"]

_STEPS, _SEEDS = 5, 5


def simulate(shapes: Shapes, cost: CostModel, settings: DemoSettings, num_ranks: int = 8) -> dict[str, float]:
    """Samples per second ÷ those of stock Trainer, by arm, if `num_ranks` ranks took the demo's steps.

    Args:
        shapes (`Shapes`): All documents; each of a few epochs draws its steps from them.
        cost (`CostModel`): As measured by the demo.
    """
    vision, llm = cost.vision_s(shapes), cost.llm_s(shapes)
    size = num_ranks * settings.accumulation * settings.batch_size
    steps = min(_STEPS, len(shapes) // size)
    found: dict[str, list[float]] = {}
    for seed in range(_SEEDS if steps else 0):
        drawn = np.random.default_rng(seed).permutation(len(shapes))[: steps * size]
        epoch = Epoch(
            shapes=shapes.select(drawn),
            vision_s=vision[drawn],
            llm_s=llm[drawn],
            num_ranks=num_ranks,
            num_slots=settings.accumulation,
            batch_size=settings.batch_size,
            num_steps=steps,
            seed=seed,
        )
        for arm, (name, padded) in {
            "stock": ("stock", True),
            "balanced": ("hf_dflop", True),
            "packed": ("hf_dflop", False),
            "group_by_length": ("group_by_length", True),
            "batch_rebalance": ("batch_rebalance", True),
        }.items():
            deal = SIMULATED[name](epoch, padded, "step")
            found.setdefault(arm, []).append(efficiency(epoch, deal, padded=padded)["step"])
    return {arm: float(np.mean(values) / np.mean(found["stock"])) for arm, values in found.items()}
