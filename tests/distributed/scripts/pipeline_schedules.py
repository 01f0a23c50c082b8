"""Every schedule, placement and setting: gradients against the stock model; and what must fail, fails.

Arguments: names of cases (separated by semicolons), what begins them and a star, or "all".
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch

from hf_dflop.data import PackedCollator, attend_by_sample
from hf_dflop.errors import DflopError
from hf_dflop.pipeline import PipelineModel
from hf_dflop.pipeline.setup import freeze
from hf_dflop.pipeline.skeleton import unwrap
from hf_dflop.pipeline.split import LlmPart
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.pipeline.structure import read_structure
from hf_dflop.plan import make_order
from tests.distributed import pipelines as p
from tests.distributed.every_case import EVERY_CASE

COVERED = (
    "interleaved", "zero bubble", "zero bubble, tied in one stage", "colocated", "frozen tower", "frozen encoder",
    "zero bubble, replicas",
    "frozen LLM", "checkpointing", "packed", "deepstack", "encoder in stages, tied", "encoder in stages, float32",
    "encoder in stages, checkpointing", "encoder in stages, LLM replicas", "encoder in stages, autocast",
    "frozen LLM, zero bubble", "zero bubble, chunks", "encoder in stages, frozen encoder",
    "encoder in stages, its replicas", "routers", "routers, two stages",
    "routers, replicas", "routers, checkpointing", "routers, text only",
    "routers, packed", "routers, autocast", "routers, three stages", "routers of another family",
    "routers of another family, replicas", "routers of another family, three stages",
)  # fmt: skip
"""Cases whose conditions come together in others; run with every case."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of one plan."""

    layout: p.Layout
    family: str = "llava"
    plan: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    by_sample: bool = False
    """Packed samples attend one by one."""
    shuffled: bool = False
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float64
    check: bool = False
    """Whether the stages are tried on a small copy first: pipeline_gradients does so for every family."""
    patch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    wrong: bool = False
    """The gradients must not agree."""
    refused: str = ""
    """What the refusal says."""
    tolerance: float = 1e-9


@contextlib.contextmanager
def halved_features() -> Iterator[None]:
    """The gradient of one microbatch's features is halved on its way back."""
    stock = RaggedStage.get_bwd_send_ops

    def halve(self: Any, microbatch: int) -> Any:
        grad = self._input_grads.get(microbatch)
        if self.stage_index == 1 and microbatch == 0 and grad is not None:
            self._input_grads[microbatch] = grad / 2
        return stock(self, microbatch)

    with mock.patch.object(RaggedStage, "get_bwd_send_ops", halve):
        yield


@contextlib.contextmanager
def stock_split() -> Iterator[None]:
    """The split backward as torch does it, whether or not the input needs a gradient."""
    with mock.patch.object(RaggedStage, "_can_split", lambda self, received: not self.is_vision):
        yield


@contextlib.contextmanager
def own_routers() -> Iterator[None]:
    """The balancing loss sees the routers of the last stage alone."""

    def keep(self: Any, body: Any, args: Any, output: Any) -> None: ...

    with mock.patch.object(LlmPart, "_add_logits", keep):
        yield


DEEP = {"deepstack": 2}
BALANCE = {"balance": 0.5}
FOUR = {"encoder": 4}
ZB = {"schedule": "zero-bubble"}
CASES: dict[str, Case] = {
    "interleaved": Case(layout=(1, 2, 1), plan={"schedule": "interleaved", "chunks": 2}),
    "interleaved, tied": Case(layout=(1, 2, 2), plan={"schedule": "interleaved", "chunks": 2}, model={"tied": True}),
    "chunks on one rank, tied": Case(layout=(1, 1, 2), plan={"chunks": 2}, model={"tied": True}),
    "data-aware": Case(layout=(2, 2, 1), plan={"schedule": "data-aware"}),
    "order of its own": Case(layout=(1, 2, 1), shuffled=True),
    "zero bubble": Case(layout=(1, 2, 1), plan=ZB),
    "zero bubble, tied in one stage": Case(layout=(1, 1, 1), plan=ZB, model={"tied": True}),
    "zero bubble, replicas": Case(layout=(2, 1, 2), plan=ZB, family="qwen2_5_vl"),
    "zero bubble, chunks": Case(layout=(1, 2, 1), plan=ZB | {"chunks": 2}, family="qwen3_vl"),
    "zero bubble, text only": Case(layout=(1, 2, 1), plan=ZB, cells={"text_only": True}),
    "zero bubble, tied": Case(layout=(1, 2, 2), plan=ZB, model={"tied": True}, family="gemma3"),
    "colocated": Case(layout=(1, 2, 1), plan={"placement": "colocated"}, family="qwen2_5_vl"),
    "colocated, replicas": Case(layout=(2, 2, 2), plan={"placement": "colocated"}, model={"tied": True}),
    "colocated, zero bubble": Case(layout=(1, 2, 1), plan=ZB | {"placement": "colocated"}),
    "replicated": Case(layout=(2, 1, 2), plan={"placement": "replicated"}),
    "frozen tower": Case(layout=(1, 1, 2), plan={"frozen": ("vision",)}),
    "frozen tower, zero bubble": Case(layout=(1, 2, 1), plan=ZB | {"frozen": ("vision",)}),
    "frozen encoder": Case(layout=(1, 2, 1), plan={"frozen": ("vision", "connector")}),
    "frozen encoder, zero bubble": Case(layout=(1, 2, 1), plan=ZB | {"frozen": ("vision", "connector")}),
    "frozen LLM": Case(layout=(1, 2, 1), plan={"frozen": ("llm",)}),
    "frozen LLM, zero bubble": Case(layout=(1, 2, 1), plan=ZB | {"frozen": ("llm",)}),
    "frozen LLM, colocated": Case(layout=(1, 2, 2), plan={"placement": "colocated", "frozen": ("llm",)}),
    "checkpointing": Case(layout=(1, 2, 1), plan={"checkpointing": True}),
    "checkpointing, zero bubble": Case(layout=(1, 2, 1), plan=ZB | {"checkpointing": True}, family="qwen2_5_vl"),
    "packed": Case(layout=(1, 2, 1), packed=True),
    "packed, one by one": Case(layout=(1, 2, 1), packed=True, by_sample=True, check=True),
    "packed, mrope": Case(layout=(2, 1, 2), packed=True, family="qwen2_5_vl"),
    "packed, own masks": Case(layout=(1, 2, 1), packed=True, family="gemma3"),
    "autocast": Case(layout=(1, 2, 1), autocast=torch.bfloat16),
    "deepstack": Case(layout=(1, 2, 1), family="qwen3_vl", model=DEEP),
    "deepstack, too few layers": Case(
        layout=(1, 2, 1), family="qwen3_vl", model=DEEP | {"layers": 2}, refused="give the first stage more layers"
    ),
    "deepstack, too few layers, unchecked": Case(
        layout=(1, 2, 1), family="qwen3_vl", model=DEEP | {"layers": 2}, wrong=True
    ),
    "halved features": Case(layout=(1, 2, 1), patch=halved_features, wrong=True),
    "encoder in stages, tied": Case(layout=(1, 2, 1), plan={"encoder": (2, 2)}, model=FOUR | {"tied": True}),
    "encoder in stages, zero bubble": Case(layout=(1, 2, 1), plan=ZB | {"encoder": (3, 1)}, model=FOUR),
    "encoder in stages, text only": Case(
        layout=(1, 1, 2), plan=ZB | {"encoder": (2, 2)}, model=FOUR, cells={"text_only": True}
    ),
    "encoder in stages, LLM replicas": Case(
        layout=(1, 1, 2), plan={"encoder": (2, 2)}, model=FOUR, family="aya_vision"
    ),
    "encoder in stages, its replicas": Case(
        layout=(2, 1, 1), plan={"encoder": (2, 2)}, model=FOUR, family="qwen2_5_vl"
    ),
    "encoder in stages, SigLIP": Case(layout=(2, 1, 1), plan={"encoder": (1, 3)}, model=FOUR, family="gemma3"),
    "encoder in stages, newline": Case(
        layout=(1, 1, 2), plan={"encoder": (3, 1)}, model=FOUR, family="llava_onevision"
    ),
    "encoder in stages, deepstack": Case(
        layout=(1, 2, 1), plan={"encoder": (1, 1, 2)}, model=FOUR | DEEP, family="qwen3_vl", check=True
    ),
    "encoder in stages, frozen encoder": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2), "frozen": ("vision", "connector")}, model=FOUR
    ),
    "encoder in stages, checkpointing": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2), "checkpointing": True}, model=FOUR
    ),
    "encoder in stages, autocast": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2)}, model=FOUR, autocast=torch.bfloat16
    ),
    "encoder in stages, float32": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2)}, model=FOUR, dtype=torch.float32, tolerance=1e-4
    ),
    "encoder in stages, float32, mrope": Case(
        layout=(2, 1, 1),
        plan={"encoder": (2, 2)},
        model=FOUR,
        family="qwen2_5_vl",
        dtype=torch.float32,
        tolerance=1e-4,
    ),
    "encoder in stages, halved": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2)}, model=FOUR, patch=halved_features, wrong=True
    ),
    "encoder in stages, features of an early depth": Case(
        layout=(1, 1, 1),
        plan={"encoder": (2, 2)},
        model=FOUR | {"feature_layers": (1, -1)},
        refused="taken at a depth before its layers",
    ),
    "encoder in stages, features of an early depth, unchecked": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2)}, model=FOUR | {"feature_layers": (1, -1)}, wrong=True
    ),
    "encoder in stages, features of a late depth": Case(
        layout=(1, 1, 1), plan={"encoder": (2, 2)}, model=FOUR | {"feature_layers": (2, -1)}
    ),
    "adapters": Case(layout=(1, 2, 2), model={"tied": True, "adapted": r".*(q_proj|v_proj|down_proj|fc1|linear_2)"}),
    "adapters, zero bubble": Case(
        layout=(2, 2, 1), plan=ZB, model={"adapted": r".*(q_proj|up_proj|qkv|mlp\.2)"}, family="qwen2_5_vl"
    ),
    "adapters, encoder in stages": Case(
        layout=(1, 1, 1), plan=ZB | {"encoder": (2, 2)}, model=FOUR | {"adapted": r".*(q_proj|fc2)"}
    ),
    "adapters in the last layer alone": Case(
        layout=(1, 2, 1), plan=ZB, model={"adapted": r".*layers\.3\.mlp\.up_proj"}
    ),
    "adapters in the encoder alone": Case(
        layout=(1, 2, 1), plan={"placement": "colocated"}, model={"adapted": r".*(fc1|linear_1)"}
    ),
    "routers": Case(layout=(1, 1, 1), family="qwen3_vl_moe", model=BALANCE),
    "routers, two stages": Case(layout=(1, 2, 1), family="qwen3_vl_moe", model=BALANCE, check=True),
    "routers, three stages": Case(layout=(1, 3, 1), family="qwen3_vl_moe", model=BALANCE | {"layers": 6}),
    "routers, replicas": Case(layout=(1, 2, 2), family="qwen3_vl_moe", model=BALANCE),
    "routers, zero bubble": Case(layout=(1, 3, 1), plan=ZB, family="qwen3_vl_moe", model=BALANCE | {"layers": 6}),
    "routers, chunks": Case(
        layout=(1, 2, 1), plan=ZB | {"chunks": 2}, family="qwen3_vl_moe", model=BALANCE | {"tied": True}
    ),
    "routers, checkpointing": Case(
        layout=(1, 2, 1), plan=ZB | {"checkpointing": True}, family="qwen3_vl_moe", model=BALANCE
    ),
    "routers, text only": Case(
        layout=(1, 2, 1), plan=ZB, family="qwen3_vl_moe", model=BALANCE, cells={"text_only": True}
    ),
    "routers, packed": Case(layout=(1, 2, 1), family="qwen3_vl_moe", model=BALANCE, packed=True),
    "routers, autocast": Case(layout=(1, 2, 1), family="qwen3_vl_moe", model=BALANCE, autocast=torch.bfloat16),
    "routers, float32": Case(
        layout=(1, 2, 2), family="qwen3_vl_moe", model=BALANCE, dtype=torch.float32, tolerance=1e-4
    ),
    "routers of another family": Case(layout=(1, 1, 1), family="glm4v_moe", model=BALANCE),
    "routers of another family, two stages": Case(
        layout=(1, 2, 1), plan=ZB, family="glm4v_moe", model=BALANCE, check=True
    ),
    "routers of another family, three stages": Case(
        layout=(1, 3, 1), family="glm4v_moe", model=BALANCE | {"layers": 6}, dtype=torch.float32, tolerance=1e-4
    ),
    "routers of another family, replicas": Case(  # the tower interpolates its position embedding in float32
        layout=(1, 2, 2), plan={"frozen": ("vision",)}, family="glm4v_moe", model=BALANCE
    ),
    "routers of the last stage alone": Case(
        layout=(1, 2, 1), family="qwen3_vl_moe", model=BALANCE, patch=own_routers, wrong=True
    ),
    "a weight of two stages": Case(layout=(1, 2, 1), model={"shared": True}, refused="trained as two"),
    "stock zero bubble": Case(layout=(1, 2, 1), plan=ZB, cells={"text_only": True}, patch=stock_split, wrong=True),
}


def without_routers(case: Case) -> Case:
    """Where models do not look at their config for the balancing loss, asking for it there is refused."""
    return replace(case, refused="computes no balancing loss") if case.model.get("balance") else case


def build(family: str, dtype: torch.dtype, settings: dict[str, Any], by_sample: bool) -> Any:
    built = p.model(family, dtype, **settings)
    assert not by_sample or attend_by_sample(built)
    return built


def collate_of(family: str, dtype: torch.dtype, packed_for: Any = None) -> Callable[..., Any]:
    """Of rows of that family; packed, if a model is given."""
    stock_collator = p.collator(family)
    return p.casting(stock_collator if packed_for is None else PackedCollator(stock_collator, packed_for), dtype)


@functools.cache
def stock(
    family: str,
    dtype: torch.dtype,
    model: frozenset[Any],
    cells: frozenset[Any],
    frozen: tuple[str, ...],
    packed: bool,
    by_sample: bool,
    autocast: torch.dtype | None,
) -> tuple[float, p.Gradients]:
    """The stock model's step, once for all cases that compare with it."""
    built = build(family, dtype, dict(model), by_sample)
    collate = collate_of(family, dtype, built if packed else None)
    rows = p.cells_of(family, **dict(cells))
    labels = p.shape_of(family, [[cell] for cell in rows], collate).label_tokens
    freeze(unwrap(built), read_structure(unwrap(built)), frozen)
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        return p.stock_gradients(built, rows, collate, labels)


def run(worlds: p.Worlds, name: str, case: Case) -> None:
    dtype = case.dtype if case.autocast is None else torch.float32
    layers = case.model.get("layers", 4)
    plan = p.plan(case.layout, layers=layers, **case.plan)
    cells = p.cells_of(case.family, **case.cells)
    with worlds.of(plan.num_ranks) as inside, case.patch():
        if not inside:
            return
        built = build(case.family, dtype, case.model, case.by_sample)
        collate = collate_of(case.family, dtype, built if case.packed else None)
        dealt = p.deal(cells, case.layout[2])
        order = None
        if case.shuffled:
            columns = (0, 1, 2)
            order = make_order(
                "1f1b", stage_rank=columns, num_microbatches=len(dealt), microbatches=[3, 1, 7, 0, 6, 2, 5, 4]
            )

        def piped() -> tuple[PipelineModel, p.StepBatch]:
            check = case.check or bool(case.refused)
            pipe = PipelineModel.from_model(built, plan=plan, autocast=case.autocast, order=order, check=check)
            shape = p.shape_of(case.family, dealt, collate)
            return pipe, p.batch_of(pipe, dealt, shape, collate, collate_of(case.family, dtype))

        def step_first() -> None:
            pipe, batch = piped()
            pipe.step(batch)

        if case.refused:
            with pytest.raises(DflopError, match=case.refused):
                step_first()
            print(f"schedules: {name}: refused", flush=True)
            return
        loss, gradients = p.told(
            lambda: stock(
                case.family,
                dtype,
                frozenset(case.model.items()),
                frozenset(case.cells.items()),
                plan.frozen,
                case.packed,
                case.by_sample,
                case.autocast,
            )
        )
        pipe, batch = piped()
        evaluated = pipe.step(batch, backward=False)
        result = pipe.step(batch)
        error, where = p.worst_error(pipe, gradients)
        worst = p.over_ranks(error)
        if case.wrong:
            assert worst > 1e-3, f"{name} must fail: {worst:.1e}"
        else:
            assert abs(result.loss - loss) <= case.tolerance * loss, (name, result.loss, loss)
            assert abs(evaluated.loss - loss) <= case.tolerance * loss, (name, evaluated.loss, loss)
            assert error <= case.tolerance, f"{name}: {error:.1e} at {where}"
            before = {n: None if q.grad is None else q.grad.clone() for n, q in pipe.named_parameters()}
            pipe.step(batch)  # on top of what was summed already
            twice = [(q.grad, before[n]) for n, q in pipe.named_parameters() if q.grad is not None]
            assert all(torch.allclose(a, 2 * b, rtol=1e-6, atol=1e-12) for a, b in twice), name
        if worlds.rank == 0:
            print(f"schedules: {name}: {worst:.1e}", flush=True)


def asked() -> list[str]:
    given = sys.argv[1]
    if given == "all":
        return [name for name in CASES if EVERY_CASE or name not in COVERED]
    return [name for name in CASES if name in given.split(";") or (given[-1] == "*" and name.startswith(given[:-1]))]


def prepare() -> None:
    for case in map(CASES.__getitem__, asked()):
        dtype = case.dtype if case.autocast is None else torch.float32
        p.prepare(case.family, bool(case.cells), dtype=dtype, **case.model)


if __name__ == "__main__":
    worlds = p.Worlds()
    TAKES_ROUTERS = p.takes_routers(p.model("qwen3_vl_moe", torch.float32))
    for name in asked():
        run(worlds, name, CASES[name] if TAKES_ROUTERS else without_routers(CASES[name]))
