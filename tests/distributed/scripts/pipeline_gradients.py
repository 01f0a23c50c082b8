"""Gradients of every parameter through the pipeline against the stock model in one process.

Arguments: "suite" (two families in all layouts, every family in one); or families (comma separated, or "all"), layouts
("all" or "2,1,1;1,2,2") and float64 or float32.
"""

import sys
import time
from typing import Any

import torch

from hf_dflop.pipeline import PipelineModel
from tests.distributed import pipelines as p

LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (3, 1, 2)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def run(family: str, layout: p.Layout, dtype: torch.dtype, expected: Any, **settings: Any) -> float:
    """One step; returns the worst relative error over all ranks."""
    collate = expected["collate"]
    dealt = p.deal(expected["cells"], layout[2])
    plan = p.plan(layout, num_microbatches=len(dealt), **settings)
    pipe = PipelineModel.from_model(p.model(family, dtype, tied=expected["tied"]), plan=plan)
    shape = p.shape_of(family, dealt, collate)
    result = pipe.step(p.batch_of(pipe, dealt, shape, collate))
    error, where = p.worst_error(pipe, expected["gradients"])
    assert p.covered(pipe), f"{family} {layout}: parameters are missing"
    assert result.label_tokens == shape.label_tokens, (result, shape.label_tokens)
    assert abs(result.loss - expected["loss"]) <= TOLERANCE[dtype] * expected["loss"], (result.loss, expected["loss"])
    assert error <= TOLERANCE[dtype], f"{family} {layout} {settings}: {error:.1e} at {where}"
    return p.over_ranks(error)


def reference(
    worlds: p.Worlds, family: str, dtype: torch.dtype, tied: bool = False, text_only: bool = False, **settings: Any
) -> Any:
    """The stock model's step, computed by rank 0 and told to all."""
    collate = p.casting(p.collator(family), dtype)
    cells = p.cells_of(family, text_only=text_only)
    told = None
    if worlds.rank == 0:
        labels = p.shape_of(family, [[cell] for cell in cells], collate).label_tokens
        stock = p.model(family, dtype, tied=tied, **settings)
        loss, gradients = p.stock_gradients(stock, cells, collate, labels)
        told = (
            loss,
            gradients,
            float(torch.nn.utils.get_total_norm([q.grad for q in stock.parameters() if q.grad is not None])),
        )
    loss, gradients, norm = worlds.tell(told)
    return {"cells": cells, "collate": collate, "loss": loss, "gradients": gradients, "norm": norm, "tied": tied}


def jobs() -> list[tuple[str, list[p.Layout], torch.dtype, bool]]:
    """Family, layouts, type, tied embeddings."""
    if sys.argv[1] == "suite":
        whole = [("llava", LAYOUTS, torch.float64, True), ("qwen3_vl", LAYOUTS, torch.float64, False)]
        short = [(f, [(3, 1, 2), (1, 2, 1)][i % 2 :][:1], torch.float64, False) for i, f in enumerate(p.FAMILIES)]
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
        expected = reference(worlds, family, dtype, tied)
        for layout in layouts:
            with worlds.of(layout[0] + layout[1] * layout[2]) as inside:
                if inside:
                    error = run(family, layout, dtype, expected)
                    if worlds.rank == 0:
                        print(f"gradients: {family} {layout}: {error:.1e}", flush=True)
        if worlds.rank == 0:
            print(f"{family}: {time.perf_counter() - start:.1f} s", flush=True)
