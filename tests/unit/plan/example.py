"""A small model, a dataset's shapes and a run that was recorded from known seconds."""

import json
from pathlib import Path

import numpy as np

from hf_dflop.cost import ConnectorSpec, CostModel, ModelSpec, TransformerSpec
from hf_dflop.plan import ModulePlan, Plan
from hf_dflop.plan.step import stock_groups
from hf_dflop.shapes import Shapes

VISION_LAYERS, LLM_LAYERS = 6, 8


def spec() -> ModelSpec:
    return ModelSpec(
        vision=TransformerSpec(
            hidden=64, num_layers=VISION_LAYERS, heads=4, kv_heads=4, head_dim=16, intermediate=256, gated_mlp=False
        ),
        connector=ConnectorSpec(merge=4, linears=((256, 128), (128, 128))),
        llm=TransformerSpec(
            hidden=128,
            num_layers=LLM_LAYERS,
            heads=4,
            kv_heads=2,
            head_dim=32,
            intermediate=256,
            gated_mlp=True,
            vocab=1000,
        ),
        patch_size=14,
    )


def cost(**others: float) -> CostModel:
    return CostModel.analytic(spec(), **({"vision_flops_per_s": 1e10, "llm_flops_per_s": 2e10} | others))


def shapes(num_samples: int = 200, seed: int = 0) -> Shapes:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, num_samples)
    text = rng.lognormal(4, 0.8, num_samples).astype(np.int64) + 5
    return Shapes(
        num_images=images,
        image_tiles=images,
        image_patches=images * 256,
        image_patches_sq=images * 256**2,
        image_tokens=images * 64,
        text_tokens=text,
        label_tokens=text // 2,
    )


def plan(**changed) -> Plan:
    fields = {
        "vision": ModulePlan(layers=(VISION_LAYERS,), dp=2),
        "llm": ModulePlan(layers=(4, 4), dp=3),
        "num_microbatches": 4,
        "global_batch_size": 48,
    }
    return Plan(**(fields | changed))


def replicated(dp: int = 2, **changed) -> Plan:
    modules = {"vision": ModulePlan(layers=(VISION_LAYERS,), dp=dp), "llm": ModulePlan(layers=(LLM_LAYERS,), dp=dp)}
    return plan(**({"placement": "replicated", "global_batch_size": 24, **modules} | changed))


def record_run(folder: Path, data: Shapes, *, vision: float, llm: float, microbatch_s: float, noise: float) -> None:
    """Ten steps of two ranks with four microbatches of three samples; seconds are those of `cost()`, changed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    truth, now = cost(), 1.7e9
    lines: list[list[str]] = [[], []]
    for step in range(10):
        drawn = rng.permutation(len(data))[:24]
        groups = [[drawn[group] for group in rank] for rank in stock_groups(24, 2, 4)]
        ends = []
        for rank in range(2):
            at, slots = now + 0.01, []
            for group in groups[rank]:
                batch = data.select(group)
                seconds = vision * truth.vision_s(batch).sum() + llm * truth.llm_s(batch).sum() + microbatch_s
                at += seconds * (1 + noise * rng.standard_normal())
                slots.append(at)
            ends.append(slots)
        sync = max(slots[-1] for slots in ends) + 0.02
        for rank in range(2):
            clock = 100.0 * rank  # the second machine's clock
            record = {
                "step": step,
                "rank": rank,
                "begin_s": now + 0.01 + clock,
                "data_s": 0.01,
                "slot_end_s": [end + clock for end in ends[rank]],
                "sync_end_s": sync + clock,
                "end_s": sync + 0.004 + clock,
                "samples": [group.tolist() for group in groups[rank]],
            }
            lines[rank].append(json.dumps(record) + "\n")
        now = sync + 0.004
    for rank in range(2):
        (folder / f"trace-rank{rank:05d}.jsonl").write_text("".join(lines[rank]))
