"""Small models, datasets and clusters to plan for."""

from dataclasses import replace

import numpy as np

from hf_dflop.cost import ConnectorSpec, CostModel, ModelSpec, TransformerSpec
from hf_dflop.plan.cluster import Cluster, Gpu
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.workload import Workload, draw_batches
from hf_dflop.shapes import Shapes


def small_spec(*, vision_layers: int = 4, llm_layers: int = 6, hidden: int = 512, vocab: int = 4000) -> ModelSpec:
    size = {"heads": 4, "kv_heads": 4, "gated_mlp": False}
    return ModelSpec(
        vision=TransformerSpec(hidden=256, num_layers=vision_layers, head_dim=64, intermediate=1024, **size),
        connector=ConnectorSpec(merge=1, linears=((256, hidden),)),
        llm=TransformerSpec(
            hidden=hidden, num_layers=llm_layers, head_dim=hidden // 4, intermediate=4 * hidden, vocab=vocab, **size
        ),
        patch_size=14,
    )


def mixture(seed: int, num_samples: int = 200) -> Shapes:
    random = np.random.default_rng(seed)
    tiles = np.where(random.random(num_samples) < 0.3, 0, random.integers(1, 12, num_samples))
    text = random.lognormal(4.5, 0.8, num_samples).astype(np.int64) + 5
    return Shapes(
        num_images=(tiles > 0).astype(np.int64),
        image_tiles=tiles,
        image_patches=tiles * 256,
        image_patches_sq=tiles * 256**2,
        image_tokens=tiles * 64,
        text_tokens=text,
        label_tokens=text // 2,
    )


def small_gpu(memory_gib: float = 4.0) -> Gpu:
    return Gpu(
        name="small",
        memory_bytes=memory_gib * 2**30,
        peak_flops_per_s=2e13,
        memory_bytes_per_s=5e11,
        link_bytes_per_s=2e10,
    )


NO_RESERVE = MemoryRule(reserve_bytes=0.0)


def scorer_of(
    cluster: Cluster, spec: ModelSpec, shapes: Shapes, batch: int, *, num_batches: int = 2, **ways: object
) -> Scorer:
    rate = cluster.reference.flops_per_s
    cost = CostModel.analytic(spec, vision_flops_per_s=rate, llm_flops_per_s=rate)
    workload = Workload(cost, draw_batches(shapes, batch, num_batches, 0), **ways)  # type: ignore[arg-type]
    return Scorer(workload, cluster, NO_RESERVE)


def smaller(spec: ModelSpec, **changes: object) -> ModelSpec:
    return replace(spec, llm=replace(spec.llm, **changes))
