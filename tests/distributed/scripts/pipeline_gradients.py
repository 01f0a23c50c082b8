"""Gradients of every parameter through the pipeline against the stock model in one process.

Arguments: families (comma separated, or "all"), layouts ("all" or "2,1,1;1,2,2"), float64 or float32.
"""

import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from hf_dflop.pipeline import PipelineModel
from tests.distributed import pipelines as p
from tests.unit.data.families import FAMILIES

LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (3, 1, 2)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def run(family: str, layout: p.Layout, dtype: torch.dtype, group: Any, expected: Any, **settings: Any) -> float:
    """One step; returns the worst relative error over all ranks."""
    cells, shape_cells, collate = expected["cells"], expected, expected["collate"]
    dealt = p.deal(cells, layout[2])
    plan = p.plan(layout, num_microbatches=len(dealt), **settings)
    pipe = PipelineModel.from_model(p.model(family, dtype, tied=expected["tied"]), plan=plan, group=group)
    shape = p.shape_of(family, dealt, collate)
    result = pipe.step(p.batch_of(pipe, dealt, shape, collate))
    error, where = p.worst_error(pipe, expected["gradients"])
    assert p.covered(pipe), f"{family} {layout}: parameters are missing"
    assert result.label_tokens == shape.label_tokens, (result, shape.label_tokens)
    assert abs(result.loss - expected["loss"]) <= TOLERANCE[dtype] * expected["loss"], (result.loss, expected["loss"])
    assert error <= TOLERANCE[dtype], f"{family} {layout} {settings}: {error:.1e} at {where}"
    del shape_cells
    return p.over_ranks(error, group)


def reference(family: str, dtype: torch.dtype, tied: bool = False, **settings: Any) -> dict[str, Any]:
    """The stock model's step, computed by rank 0 and told to all."""
    collate = p.casting(p.collator(family), dtype)
    cells = p.cells_of(family, **settings)
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        labels = p.shape_of(family, [[cell] for cell in cells], collate).label_tokens
        told = [p.stock_gradients(p.model(family, dtype, tied=tied), cells, collate, labels)]
    dist.broadcast_object_list(told)
    loss, gradients = told[0]
    return {"cells": cells, "collate": collate, "loss": loss, "gradients": gradients, "tied": tied}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names = list(FAMILIES) if sys.argv[1] == "all" else sys.argv[1].split(",")
    layouts = LAYOUTS if sys.argv[2] == "all" else [tuple(map(int, x.split(","))) for x in sys.argv[2].split(";")]
    dtype = getattr(torch, sys.argv[3])
    groups = {n: dist.new_group(range(n)) for n in range(2, dist.get_world_size() + 1)}
    for family in names:
        start = time.perf_counter()
        expected = reference(family, dtype)
        for layout in layouts:
            size = layout[0] + layout[1] * layout[2]
            if dist.get_rank() < size:
                error = run(family, layout, dtype, groups[size], expected)
                if dist.get_rank() == 0:
                    print(f"gradients: {family} {layout}: {error:.1e}", flush=True)
            dist.barrier()
        if dist.get_rank() == 0:
            print(f"{family}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.destroy_process_group()
