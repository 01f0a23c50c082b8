"""Gradients through a pipeline whose stages are split over tensor-parallel ranks, against the stock model; what is
refused, and controls that must fail. Arguments: "suite", "all", or names of cases (comma separated)."""

import sys
import time
from typing import Any
from unittest import mock

import pytest
import torch

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline import PipelineModel
from hf_dflop.pipeline.shards import Shards
from tests.distributed import pipelines as p
from tests.distributed.scripts.pipeline_gradients import TOLERANCE, reference

DENSE = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "colwise"),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "colwise"),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "rowwise"),
}
NORMS = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), "replicated_with_grad_allreduce")
CLIP = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), "colwise"),
    **dict.fromkeys(("self_attn.out_proj", "mlp.fc2"), "rowwise"),
}

CASES: dict[str, tuple[str, p.Layout, dict[str, Any]]] = {
    "llava tp2": ("llava", (1, 1, 1), {"tp": 2, "tied": True}),
    "llava pp2 tp2": ("llava", (1, 2, 1), {"tp": 2, "tied": True}),
    "llava tp2 dp2": ("llava", (1, 1, 2), {"tp": 2, "tied": True}),
    "llava zero bubble": ("llava", (1, 2, 1), {"tp": 2, "schedule": "zero-bubble", "tied": True}),
    "llava recomputed": ("llava", (1, 1, 1), {"tp": 2, "checkpointing": True, "tied": True}),
    "llava colocated": ("llava", (1, 1, 2), {"tp": 2, "placement": "colocated", "tied": True}),
    "llava encoder tp2": ("llava", (1, 1, 1), {"vision_tp": 2, "tied": True}),
    "llava encoder pp2 tp2": ("llava", (1, 1, 1), {"vision_tp": 2, "encoder": (1, 1)}),
    "llava both colocated": ("llava", (1, 1, 1), {"vision_tp": 2, "tp": 2, "placement": "colocated", "tied": True}),
    "llava tp2 float32": ("llava", (1, 2, 1), {"tp": 2, "tied": True, "dtype": torch.float32}),
    "qwen2_5_vl tp2": ("qwen2_5_vl", (1, 1, 1), {"tp": 2}),
    "qwen2_5_vl pp2 tp2": ("qwen2_5_vl", (1, 2, 1), {"tp": 2}),
    "qwen2_5_vl tp2 dp2": ("qwen2_5_vl", (1, 1, 2), {"tp": 2}),
    "gemma3 tp2": ("gemma3", (1, 1, 1), {"tp": 2, "tied": True}),
    "gemma3 pp2 tp2": ("gemma3", (1, 2, 1), {"tp": 2, "tied": True}),
    "gemma3 tp2 dp2": ("gemma3", (1, 1, 2), {"tp": 2, "tied": True}),
    "qwen3_vl tp2": ("qwen3_vl", (2, 1, 1), {"tp": 2}),
    "qwen3_vl_moe tp2": ("qwen3_vl_moe", (1, 2, 1), {"tp": 2}),
}
SUITE = (
    "llava tp2 dp2", "llava zero bubble", "llava colocated", "llava encoder tp2", "qwen2_5_vl tp2", "gemma3 tp2",
    "qwen3_vl_moe tp2",
)  # fmt: skip
"""Of them, what the test suite runs; `make test-all` runs all."""


def build(family: str, dtype: torch.dtype, vision_tp: int, **settings: Any) -> Any:
    """A model; where its class has no tensor-parallel plan, with one."""
    model = p.model(family, dtype, key_heads=2, **settings)
    rules: dict[str, str] = {}
    if family.startswith("qwen3_vl"):
        rules = {f"model.language_model.layers.*.{name}": style for name, style in {**DENSE, **NORMS}.items()}
    if vision_tp > 1:
        tower = next(name for name, m in model.named_modules() if name.endswith("encoder.layers"))
        rules |= {f"{tower}.*.{name}": style for name, style in CLIP.items()}
    if rules:
        model.tp_plan = model.tp_plan | rules
    return model


def run(name: str, expected: Any, dtype: torch.dtype, *, check: bool = False, control: bool = False) -> float:
    """One step of a case; the worst relative error over all ranks. `check`: try the shards on a small copy first;
    `control`: it must not agree."""
    family, layout, settings = CASES[name]
    settings = {key: value for key, value in settings.items() if key not in ("tied", "dtype")}
    dealt = p.deal(expected["cells"], layout[2])
    plan = p.plan(layout, num_microbatches=len(dealt), **settings)
    model = build(
        family, dtype, plan.vision.tp, tied=expected["tied"], encoder=len(plan.vision.layers) * (plan.vision.pp > 1)
    )
    pipe = PipelineModel.from_model(model, plan=plan, check=check)
    assert (pipe.shards is not None) == (
        pipe.place.shard > 0 or len(pipe.topology.shards(pipe.place.stages[0], 0)) > 1
    )
    assert pipe.shards is None or any(map(pipe.shards.is_split, dict(pipe.named_parameters())))
    shape = p.shape_of(family, dealt, expected["collate"])
    result = pipe.step(p.batch_of(pipe, dealt, shape, expected["collate"]))
    assert result.label_tokens == shape.label_tokens
    assert abs(result.loss - expected["loss"]) <= TOLERANCE[dtype] * expected["loss"], (result.loss, expected["loss"])
    assert control or abs(float(pipe.grad_norm()) / expected["norm"] - 1) <= TOLERANCE[dtype], expected["norm"]
    return p.over_ranks(p.worst_error(pipe, expected["gradients"])[0])


def controls(expected: Any) -> None:
    """What must not pass: gradients that are not summed over the shards, a wrong plan, a module without one."""
    with mock.patch.object(Shards, "settle", return_value=None):
        error = run("gemma3 tp2", expected, torch.float64, control=True)
        assert error > 1e-3, error
    dealt = p.deal(expected["cells"], 1)
    shape = p.shape_of("gemma3", dealt, expected["collate"])
    settings = {"num_microbatches": len(dealt), "tp": 2}
    model = p.model("gemma3", tied=True, key_heads=2)
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if not name.endswith("q_norm")}
    pipe = PipelineModel.from_model(model, plan=p.plan((1, 1, 1), **settings))
    with pytest.raises(ModelError, match=r"q_norm.weight on a small copy is not that of the whole"):
        pipe.step(p.batch_of(pipe, dealt, shape, expected["collate"]))
    for name, family, place in (("tp", "qwen3_vl", "layers.0 of Qwen3VL"), ("vision_tp", "llava", "CLIPVision")):
        plan = p.plan((1, 1, 1), **({"tp": 1} | {name: 2}))
        with pytest.raises(PlanError, match=f"{place}.* no tensor-parallel plan"):
            PipelineModel.from_model(p.model(family), plan=plan)
    with pytest.raises(PlanError, match="does not divide the 1 num_key_value_heads"):
        PipelineModel.from_model(p.model("llava"), plan=p.plan((1, 1, 1), tp=2))
    if p.dist.get_rank() == 0:
        print(f"tensor: controls fail, {error:.1e}", flush=True)


def asked() -> list[str]:
    return {"suite": list(SUITE), "all": list(CASES)}.get(sys.argv[1]) or sys.argv[1].split(",")


def prepare() -> None:
    for family, _, settings in map(CASES.__getitem__, asked()):
        chosen = {"dtype": settings.get("dtype", torch.float64), "tied": settings.get("tied", False), "key_heads": 2}
        p.prepare(family, **chosen)


if __name__ == "__main__":
    worlds = p.Worlds()
    checked: set[tuple[str, int]] = set()
    for name in asked():
        start = time.perf_counter()
        family, layout, settings = CASES[name]
        dtype, tied = settings.get("dtype", torch.float64), settings.get("tied", False)
        encoder = len(settings.get("encoder", ())) if len(settings.get("encoder", ())) > 1 else 0
        kind = (family, settings.get("vision_tp", 1))
        check = kind not in checked
        checked.add(kind)
        plan = p.plan(layout, **{k: v for k, v in settings.items() if k not in ("tied", "dtype")})
        with worlds.of(plan.num_ranks) as inside:
            if inside:
                expected = reference(family, dtype, tied, few_shapes=True, encoder=encoder, key_heads=2)
                error = run(name, expected, dtype, check=check)
                assert error <= TOLERANCE[dtype], (name, error)
                if worlds.rank == 0:
                    print(f"tensor: {name}: {error:.1e} {time.perf_counter() - start:.1f} s", flush=True)
                if name == "gemma3 tp2":
                    controls(expected)
