"""Ten AdamW steps with weight decay, clipping and accumulation against the stock model; then saved and loaded.

Arguments: families (comma separated), layout, float64 or float32, layers of each encoder stage (1 or 2,2); tensor-
parallel ranks of the LLM, by default 1.
"""

import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from hf_dflop.pipeline import PipelineModel, StepShape
from tests.distributed import pipelines as p

STEPS, CALLS, MAX_NORM = 10, 2, 0.05
ADAMW = {"lr": 1e-3, "weight_decay": 0.5}


def calls_of(family: str, step: int) -> list[p.Cells]:
    """The cells of each accumulated call of a step."""
    cells = p.cells_of(family)
    turned = cells[step % len(cells) :] + cells[: step % len(cells)]
    return [turned[: len(cells) // CALLS], turned[len(cells) // CALLS :]]


ENCODER = tuple(map(int, sys.argv[4].split(",")))
TP = int(sys.argv[5]) if len(sys.argv) > 5 else 1


def build(family: str, dtype: torch.dtype) -> Any:
    return p.model(
        family, dtype, tied=True, key_heads=TP if TP > 1 else 0, encoder=sum(ENCODER) if len(ENCODER) > 1 else 0
    )


def stock_run(family: str, dtype: torch.dtype) -> Any:
    collate = p.casting(p.collator(family), dtype)
    built = build(family, dtype)
    optimizer = torch.optim.AdamW(built.parameters(), **ADAMW)
    log = []
    for step in range(STEPS):
        cells = [cell for call in calls_of(family, step) for cell in call]
        labels = p.shape_of(family, [[cell] for cell in cells], collate).label_tokens
        loss, _ = p.stock_gradients(built, cells, collate, labels)
        norm = torch.nn.utils.clip_grad_norm_(built.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss, float(norm)))
    return log, built.state_dict()


def run(worlds: p.Worlds, family: str, layout: p.Layout, dtype: torch.dtype) -> None:
    size = layout[0] * len(ENCODER) + layout[1] * layout[2] * TP
    with worlds.of(size) as inside:
        if not inside:
            return
        log, expected = p.told(lambda: stock_run(family, dtype))
        collate = p.casting(p.collator(family), dtype)
        num_microbatches = len(calls_of(family, 0)[0]) // layout[2]
        plan = p.plan(layout, num_microbatches=num_microbatches, encoder=ENCODER, tp=TP)
        pipe = PipelineModel.from_model(build(family, dtype), plan=plan)
        optimizer = torch.optim.AdamW(pipe.parameters(), **ADAMW)
        worst = 0.0
        for step, (loss, norm) in enumerate(log):
            calls = [p.deal(cells, layout[2]) for cells in calls_of(family, step)]
            shapes = [p.shape_of(family, dealt, collate) for dealt in calls]
            labels = sum(shape.label_tokens for shape in shapes)
            found = 0.0
            for index, (dealt, shape) in enumerate(zip(calls, shapes, strict=True)):
                whole = StepShape(microbatches=shape.microbatches, label_tokens=labels)
                batch = p.batch_of(pipe, dealt, whole, collate)
                found += pipe.step(batch, sync=index == CALLS - 1).loss
            found_norm = float(pipe.clip_grad_norm_(MAX_NORM))
            optimizer.step()
            optimizer.zero_grad()
            worst = max(worst, abs(found / loss - 1), abs(found_norm / norm - 1))
            assert norm > 2 * MAX_NORM, norm  # clipping is at work
        assert worst <= 1e-5, (family, worst)
        moved = 0.0
        largest = max(float(value.abs().max()) for value in expected.values())
        for name, value in pipe.state_dict().items():  # key biases, whose gradient is zero, stay rounding noise
            scale = max(float(expected[name].abs().max()), p.FLOOR * largest)
            moved = max(moved, float((pipe.whole(name, value) - expected[name]).abs().max()) / scale)
        assert moved <= 1e-5, (family, moved)
        worst = max(p.over_ranks(worst), p.over_ranks(moved))
        check_saved(pipe, family, layout, collate, expected)
        if worlds.rank == 0:
            print(f"steps: {family} {layout} {dtype}: {worst:.1e}", flush=True)


def check_saved(pipe: PipelineModel, family: str, layout: p.Layout, collate: Any, expected: Any) -> None:
    """What is saved is a stock checkpoint: plain transformers loads it and gives the pipeline's logits."""
    dealt = p.deal(p.cells_of(family), layout[2])
    shape = p.shape_of(family, dealt, collate)
    pipe.eval()
    logits = pipe.step(p.batch_of(pipe, dealt, shape, collate), backward=False, keep_logits=True).logits
    pipe.train()
    told = [tempfile.mkdtemp()]
    dist.broadcast_object_list(told)
    pipe.save_pretrained(told[0])
    loaded = AutoModelForImageTextToText.from_pretrained(
        told[0], dtype=(dtype := next(pipe.parameters()).dtype), attn_implementation="sdpa"
    )
    # Loading leaves frequencies in float32, and before transformers 5.18 `keep_float64` rounds with their type.
    loaded = loaded.to(dtype).eval()
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, value in pipe.state_dict().items():
        assert torch.equal(state[name], pipe.whole(name, value)), name
    assert bool(logits) == (pipe.topology.last_stage in pipe.place.stages and pipe.place.shard == 0)
    for microbatch, found in logits.items():
        with torch.no_grad():
            stock = loaded(**collate(dealt[microbatch][pipe.place.replica])).logits
        assert float((found - stock).abs().max()) <= 1e-12 * float(stock.abs().max()), (family, microbatch)
    check_read(pipe, told[0], logits, lambda read: p.batch_of(read, dealt, shape, collate))


def check_read(pipe: PipelineModel, folder: str, logits: Any, batch: Any) -> None:
    """A pipeline that reads its share of the checkpoint is that which wrote it, bit for bit."""
    read = PipelineModel.from_pretrained(
        folder, plan=pipe.plan, dtype=pipe.wire.dtype, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    own = pipe.state_dict()
    assert read.state_dict().keys() == own.keys()
    for name, value in read.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert read.structure == pipe.structure
    again = read.step(batch(read), backward=False, keep_logits=True).logits
    assert again.keys() == logits.keys()
    assert all(torch.equal(again[microbatch], found) for microbatch, found in logits.items())


def prepare() -> None:
    dtype = getattr(torch, sys.argv[3])
    for family in sys.argv[1].split(","):
        build(family, dtype)
        p.collate_cells(family)


if __name__ == "__main__":
    worlds = p.Worlds()
    layout = tuple(map(int, sys.argv[2].split(",")))
    for family in sys.argv[1].split(","):
        run(worlds, family, layout, getattr(torch, sys.argv[3]))  # type: ignore[arg-type]
