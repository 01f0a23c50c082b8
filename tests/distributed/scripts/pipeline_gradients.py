"""Gradients of every parameter through the pipeline against the stock model in one process.

Arguments: "suite" (LLaVA in all layouts, one family in several, every family in one); or families (comma separated, or
"all"), layouts ("all" or "2,1,1;1,2,2") and float64 or float32.
"""

import functools
import sys
import time
from typing import Any

import torch

from hf_dflop.pipeline import PipelineModel
from tests.distributed import pipelines as p
from tests.distributed.every_case import EVERY_CASE

LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (3, 1, 2)]
CHECKED = [(3, 1, 2), (1, 2, 1)]
"""Where the stages are tried on a small copy first; every family is run in one of them."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def run(family: str, layout: p.Layout, dtype: torch.dtype, expected: Any, **settings: Any) -> float:
    """One step; returns the worst relative error over all ranks."""
    collate = expected["collate"]
    dealt = p.deal(expected["cells"], layout[2])
    plan = p.plan(layout, num_microbatches=len(dealt), **settings)
    model = p.model(family, dtype, tied=expected["tied"])
    pipe = PipelineModel.from_model(model, plan=plan, check=layout in CHECKED)
    shape = p.shape_of(family, dealt, collate)
    result = pipe.step(p.batch_of(pipe, dealt, shape, collate))
    error, where = p.worst_error(pipe, expected["gradients"])
    assert p.covered(pipe), f"{family} {layout}: parameters are missing"
    assert result.label_tokens == shape.label_tokens, (result, shape.label_tokens)
    assert abs(result.loss - expected["loss"]) <= TOLERANCE[dtype] * expected["loss"], (result.loss, expected["loss"])
    assert error <= TOLERANCE[dtype], f"{family} {layout} {settings}: {error:.1e} at {where}"
    return p.over_ranks(error)


def reference(
    family: str, dtype: torch.dtype, tied: bool = False, *, few_shapes: bool = False, **settings: Any
) -> Any:
    """The stock model's step, computed by rank 0, once, and told to the ranks of the world."""
    collate = p.casting(p.collator(family), dtype)
    cells = p.cells_of(family, few_shapes=few_shapes)
    loss, gradients, norm = p.told(lambda: stock(family, dtype, few_shapes, tied=tied, **settings))
    return {"cells": cells, "collate": collate, "loss": loss, "gradients": gradients, "norm": norm, "tied": tied}


@functools.cache
def stock(family: str, dtype: torch.dtype, few_shapes: bool, **settings: Any) -> tuple[float, p.Gradients, float]:
    """Loss, gradients and their norm."""
    collate, cells = p.casting(p.collator(family), dtype), p.cells_of(family, few_shapes=few_shapes)
    labels = p.shape_of(family, [[cell] for cell in cells], collate).label_tokens
    built = p.model(family, dtype, **settings)
    loss, gradients = p.stock_gradients(built, cells, collate, labels)
    norm = torch.nn.utils.get_total_norm([q.grad for q in built.parameters() if q.grad is not None])
    return loss, gradients, float(norm)


def jobs() -> list[tuple[str, list[p.Layout], torch.dtype, bool]]:
    """Family, layouts, type, tied embeddings."""
    if sys.argv[1] == "suite":
        several = LAYOUTS if EVERY_CASE else [(2, 2, 1), (1, 2, 2), (3, 1, 2)]
        whole = [("llava", LAYOUTS, torch.float64, True), ("qwen3_vl", several, torch.float64, False)]
        short = [(f, CHECKED[i % 2 :][:1], torch.float64, False) for i, f in enumerate(p.FAMILIES)]
        return whole + [job for job in short if job[0] not in ("llava", "qwen3_vl")]
    names = list(p.FAMILIES) if sys.argv[1] == "all" else sys.argv[1].split(",")
    layouts = LAYOUTS if sys.argv[2] == "all" else [tuple(map(int, x.split(","))) for x in sys.argv[2].split(";")]
    return [(name, layouts, getattr(torch, sys.argv[3]), False) for name in names]  # type: ignore[misc]


def prepare() -> None:
    for family, _, dtype, tied in jobs():
        p.prepare(family, dtype=dtype, tied=tied)


if __name__ == "__main__":
    worlds = p.Worlds()
    for family, layouts, dtype, tied in jobs():
        start = time.perf_counter()
        for layout in layouts:
            with worlds.of(layout[0] + layout[1] * layout[2]) as inside:
                if inside:
                    error = run(family, layout, dtype, reference(family, dtype, tied))
                    if worlds.rank == 0:
                        print(f"gradients: {family} {layout}: {error:.1e}", flush=True)
        if worlds.rank == 0:
            print(f"{family}: {time.perf_counter() - start:.1f} s", flush=True)
