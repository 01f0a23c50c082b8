"""Samplers over samples of random shapes; without transformers, so that another process imports it quickly."""

from typing import Any

import numpy as np

from hf_dflop.cost import ConnectorSpec, CostModel, ModelSpec, TransformerSpec
from hf_dflop.data.sampler import BalancedBatchSampler
from hf_dflop.data.step_plan import stock_caps
from hf_dflop.shapes import Shapes

SPEC = ModelSpec(
    vision=TransformerSpec(hidden=16, num_layers=2, heads=2, kv_heads=2, head_dim=8, intermediate=32, gated_mlp=False),
    connector=ConnectorSpec(merge=1, linears=((16, 24), (24, 24))),
    llm=TransformerSpec(
        hidden=24, num_layers=2, heads=4, kv_heads=2, head_dim=6, intermediate=48, gated_mlp=True, vocab=64
    ),
    patch_size=4,
    class_tokens=1,
)
COST = CostModel.analytic(SPEC)


def shapes_of(num_samples: int, seed: int = 0) -> Shapes:
    generator = np.random.default_rng(seed)
    images = np.minimum(generator.geometric(0.4, num_samples) - 1, 12)
    text = np.clip(generator.lognormal(3, 1.2, num_samples), 1, 2000).astype(np.int64)
    return Shapes(
        num_images=images, image_tiles=images, image_patches=4 * images, image_patches_sq=images * 16,
        image_tokens=4 * images, text_tokens=text, label_tokens=text // 2,
    )  # fmt: skip


def build(shapes: Shapes, num_ranks: int, num_slots: int, size: int, rank: int = 0, **kwargs: Any) -> Any:
    per_step = num_ranks * num_slots * size
    num_steps = len(shapes) // per_step
    order = [0]

    def stock() -> list[list[list[int]]]:
        """As accelerate deals a shuffled epoch: batch by batch, in turns; the order depends on the epoch alone."""
        shuffled = np.random.default_rng(100 + order[0]).permutation(len(shapes))[: num_steps * per_step]
        batches = shuffled.reshape(-1, num_ranks, size)
        return [batches[:, r].tolist() for r in range(num_ranks)]

    defaults: dict[str, Any] = {"objective": "step", "padded": False, "caps": stock_caps(shapes, size)}
    return BalancedBatchSampler(
        stock, shapes, COST, rank=rank, num_ranks=num_ranks, num_slots=num_slots, length=num_steps * num_slots,
        samples_per_step=per_step, set_stock_epoch=lambda epoch: order.__setitem__(0, epoch), look_ahead_steps=0,
        **(defaults | kwargs),
    )  # fmt: skip
