"""How long ranks would wait for each other, predicted from the shapes, before anything was trained.

Inputs: shapes and a cost model. Output: for each number of ranks and each way to deal samples, the share of the
step in which a mean rank waits, and the step's time relative to the stock way. Global batches are drawn from the
profile, seeded; the same ones for every way, except that group_by_length changes which samples meet:

    stock             in the drawn order, as `Trainer` deals them
    group_by_length   by the Trainer's sampler of that name (where transformers has it)
    batch_rebalance   by the Trainer's sampler of that name (where transformers has it)
    balanced          the stock batches, regrouped by `hf_dflop.balance.assign` within the callback's default token cap

Assumptions: data parallel, one padded microbatch per rank and step, compute only (no communication). Where the
profile has fewer samples than are drawn, some are drawn more than once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import assign
from hf_dflop.cost import CostModel
from hf_dflop.profile.stock_ways import by_batch_rebalance, by_length
from hf_dflop.shapes import Shapes

__all__ = ["RANKS", "WAYS", "Waiting", "predict_waiting"]

RANKS = (2, 8, 64)
WAYS = ("stock", "group_by_length", "batch_rebalance", "balanced")
SAMPLES_PER_RANK = 8
_SLOTS = 384
"""Microbatches that are looked at for each number of ranks, in at most 32 steps and at least 2."""
_MOST_REBALANCED = 128
"""Ranks up to which batch_rebalance is asked; its search takes minutes beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """One way to deal samples at one number of ranks."""

    num_ranks: int
    way: str
    """One of `WAYS`."""
    idle_fraction: float
    """1 - mean busy ÷ slowest rank, over all steps."""
    time_to_stock: float
    """Seconds of all steps ÷ those of the stock way."""


def predict_waiting(
    shapes: Shapes,
    cost: CostModel,
    *,
    ranks: Sequence[int] = RANKS,
    samples_per_rank: int = SAMPLES_PER_RANK,
    seed: int = 0,
) -> list[Waiting]:
    """Predict waiting for each number of ranks and each way of `WAYS`.

    Args:
        shapes (`Shapes`): samples to draw global batches from.
        cost (`CostModel`): shapes → seconds.
        ranks (`Sequence[int]`): numbers of data-parallel ranks.
        samples_per_rank (`int`, defaults to 8): samples of a microbatch.
        seed (`int`, defaults to 0): seed of the draw.
    """
    vision, llm = cost.vision_s(shapes), cost.llm_s(shapes)
    tokens = shapes.llm_tokens
    results = []
    for num_ranks in ranks:
        size = num_ranks * samples_per_rank
        drawn = _draw(len(shapes), max(2, min(32, _SLOTS // num_ranks)), size, np.random.default_rng(seed))
        steps = {
            "stock": [np.split(batch, num_ranks) for batch in drawn],
            "group_by_length": by_length(drawn, tokens, num_ranks, seed),
            "batch_rebalance": by_batch_rebalance(drawn, tokens, num_ranks) if num_ranks <= _MOST_REBALANCED else None,
            "balanced": [_balanced(batch, vision, llm, tokens, num_ranks, samples_per_rank) for batch in drawn],
        }
        stock_s = 0.0
        for way in WAYS:
            slowest, mean = 0.0, 0.0
            for groups in steps[way] or ():
                busy = [vision[group].sum() + group.size * llm[group].max() for group in groups]
                slowest += float(max(busy))
                mean += float(np.mean(busy))
            if steps[way] is None:
                continue
            stock_s = stock_s or slowest
            idle = 1 - mean / slowest if slowest else 0.0
            ratio = slowest / stock_s if stock_s else 1.0
            results.append(Waiting(num_ranks=num_ranks, way=way, idle_fraction=idle, time_to_stock=ratio))
    return results


def _draw(num_samples: int, num_steps: int, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Samples of each step, `(num_steps, size)`: epoch after epoch in shuffled order."""
    epochs = -(-num_steps * size // num_samples)
    order = np.concatenate([rng.permutation(num_samples) for _ in range(epochs)])
    return order[: num_steps * size].reshape(num_steps, size)


def _balanced(
    batch: npt.NDArray[np.int64],
    vision: npt.NDArray[np.float64],
    llm: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int64],
    num_ranks: int,
    samples_per_rank: int,
) -> list[npt.NDArray[np.int64]]:
    """The batch's samples regrouped, under the memory cap that the callback sets by default."""
    assignment = assign(
        vision[batch],
        llm[batch],
        num_ranks=num_ranks,
        num_slots=1,
        objective="step",
        padded=True,
        baseline=[[group] for group in np.split(np.arange(batch.size), num_ranks)],
        tokens=tokens[batch],
        max_tokens=samples_per_rank * int(tokens.max()),
    )
    return [batch[slots[0]] for slots in assignment.groups]
