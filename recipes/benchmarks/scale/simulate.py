"""Efficiency of a sampler at a number of ranks: useful seconds ÷ (ranks × seconds of the step).

In: a mix, a model's cost, a sampler, ranks. Out: efficiency under the three ways that ranks meet. Useful is what the
samples cost without padding; waiting and padding are what is lost.

Assumptions: compute only, no communication; every rank equally fast; a step's samples are drawn from the mix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import OBJECTIVES, assign
from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.shapes import Shapes
from recipes.benchmarks.common.mixes import draw_mix
from recipes.benchmarks.common.samplers import SAMPLERS, Deal, SamplerInput

__all__ = ["MODEL", "SIMULATED", "Epoch", "draw_epoch", "efficiency"]

# A 7B LLM behind a 400M encoder, by the fields of their published configs.
MODEL = {
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 384, "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "hidden_act": "silu",
    },
    "projector_hidden_act": "gelu",
}  # fmt: skip
_PATCHES_PER_TILE = 729


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Epoch:
    """Some steps of a run: shapes, seconds and the stock deal."""

    shapes: Shapes
    vision_s: npt.NDArray[np.float64]
    llm_s: npt.NDArray[np.float64]
    num_ranks: int
    num_slots: int
    batch_size: int
    num_steps: int
    seed: int

    @property
    def stock(self) -> Deal:
        """In drawn order, as Trainer deals a shuffled dataset."""
        order = np.arange(len(self.shapes)).reshape(-1, self.num_ranks, self.batch_size)
        return [order[:, rank].tolist() for rank in range(self.num_ranks)]


def draw_epoch(
    mix: str, num_ranks: int, *, num_slots: int, batch_size: int, num_steps: int, seed: int, vision_share: float
) -> Epoch:
    """Draw steps of a mix for the model of `MODEL`.

    Args:
        vision_share (`float`): encoder seconds ÷ LLM seconds over the whole epoch; sets the encoder's rate.
    """
    count = num_ranks * num_slots * batch_size * num_steps
    samples = draw_mix(mix, count, seed)
    patches = samples.tiles * _PATCHES_PER_TILE
    shapes = Shapes(
        num_images=samples.num_images,
        image_tiles=samples.tiles,
        image_patches=patches,
        image_patches_sq=samples.tiles * _PATCHES_PER_TILE**2,
        image_tokens=samples.tiles * samples.tokens_per_tile,
        text_tokens=samples.text_tokens,
        label_tokens=samples.text_tokens // 2,
    )
    cost = CostModel.analytic(ModelSpec.from_config(MODEL))
    vision, llm = cost.vision_s(shapes), cost.llm_s(shapes)
    return Epoch(
        shapes=shapes,
        vision_s=vision * (vision_share * llm.sum() / vision.sum()),
        llm_s=llm,
        num_ranks=num_ranks,
        num_slots=num_slots,
        batch_size=batch_size,
        num_steps=num_steps,
        seed=seed,
    )


def efficiency(epoch: Epoch, deal: Deal, *, padded: bool) -> dict[str, float]:
    """Useful ÷ spent seconds, by the name of the objective that tells where ranks meet."""
    steps = len(deal[0]) // epoch.num_slots
    spent = dict.fromkeys(("step", "slot", "stage"), 0.0)
    for step in range(steps):
        costs = np.array(
            [
                [
                    _microbatch(epoch, group, padded)
                    for group in slots[step * epoch.num_slots : (step + 1) * epoch.num_slots]
                ]
                for slots in deal
            ]
        )
        for name in spent:
            spent[name] += float(OBJECTIVES[name](costs[:, :, 0], costs[:, :, 1]))
    useful = float(epoch.vision_s.sum() + epoch.llm_s.sum()) / epoch.num_ranks
    return {name: useful / seconds for name, seconds in spent.items()}


def _microbatch(epoch: Epoch, group: list[int], padded: bool) -> tuple[float, float]:
    llm = epoch.llm_s[group]
    return float(epoch.vision_s[group].sum()), float(llm.size * llm.max() if padded else llm.sum())


def _stock(epoch: Epoch, padded: bool, objective: str) -> Deal:
    return epoch.stock


def _other(name: str) -> Callable[[Epoch, bool, str], Deal]:
    def deal(epoch: Epoch, padded: bool, objective: str) -> Deal:
        given = SamplerInput(
            stock=epoch.stock,
            num_slots=epoch.num_slots,
            tokens=epoch.shapes.llm_tokens,
            patches=epoch.shapes.image_patches,
            llm_s=epoch.llm_s,
            seed=epoch.seed,
        )
        return SAMPLERS[name](given)

    return deal


def _group_by_length(epoch: Epoch, padded: bool, objective: str) -> Deal:
    """Trainer's own sampler, dealt as accelerate deals it."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(epoch.seed)
    order = get_length_grouped_indices(
        epoch.shapes.llm_tokens.tolist(), epoch.batch_size * epoch.num_slots, generator=generator
    )
    dealt = np.array(order).reshape(-1, epoch.num_ranks, epoch.batch_size)
    return [dealt[:, rank].tolist() for rank in range(epoch.num_ranks)]


def _batch_rebalance(epoch: Epoch, padded: bool, objective: str) -> Deal:
    """Trainer's own sampler; its assignment is asked for once and dealt to all ranks."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    size = epoch.num_ranks * epoch.num_slots * epoch.batch_size
    sampler: Any = BatchRebalanceSampler(
        epoch.shapes.llm_tokens.tolist(),
        effective_batch_size=size,
        dp_size=epoch.num_ranks,
        grad_accum=epoch.num_slots,
        shuffle=False,
    )
    deal: Deal = [[] for _ in range(epoch.num_ranks)]
    ask = sampler._assign
    for step in range(epoch.num_steps):
        indices = list(range(step * size, (step + 1) * size))
        for rank, slots in enumerate(ask(indices, [sampler.lengths[i] for i in indices])):
            deal[rank] += [list(group) for group in slots]
    return deal


def _ours(epoch: Epoch, padded: bool, objective: str) -> Deal:
    size = epoch.num_ranks * epoch.num_slots * epoch.batch_size
    tokens = epoch.shapes.llm_tokens
    deal: Deal = [[] for _ in range(epoch.num_ranks)]
    for step in range(epoch.num_steps):
        indices = np.arange(step * size, (step + 1) * size)
        local = np.arange(size).reshape(epoch.num_slots, epoch.num_ranks, epoch.batch_size)
        assignment = assign(
            epoch.vision_s[indices],
            epoch.llm_s[indices],
            num_ranks=epoch.num_ranks,
            num_slots=epoch.num_slots,
            objective=objective,
            padded=padded,
            baseline=[[local[slot, rank] for slot in range(epoch.num_slots)] for rank in range(epoch.num_ranks)],
            tokens=tokens[indices],
            max_tokens=epoch.batch_size * int(tokens.max()),
            seed=step,
        )
        for rank, slots in enumerate(assignment.groups):
            deal[rank] += [indices[group].tolist() for group in slots]
    return deal


SIMULATED: dict[str, Callable[[Epoch, bool, str], Deal]] = {
    "stock": _stock,
    "group_by_length": _group_by_length,
    "batch_rebalance": _batch_rebalance,
    "llm_lpt": _other("llm_lpt"),
    "omnibal": _other("omnibal"),
    "visual_sorted": _other("visual_sorted"),
    "hf_dflop": _ours,
}
"""Samplers by name: `deal(epoch, padded, objective)`; ours alone asks for the last two."""
