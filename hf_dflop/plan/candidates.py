"""The plans of a layout: microbatches, schedule, recomputation.

In: a layout. Out: `Plan`s that fit, each with the least recomputation that does. This and `layouts` are the whole
search space; brute force over both is the test of the search.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import PlanError
from hf_dflop.plan.bound import Variant, layers_of
from hf_dflop.plan.plan import ModulePlan, Plan
from hf_dflop.plan.space import Layout, LayoutTable
from hf_dflop.plan.workload import Workload

__all__ = ["SEARCHED_SCHEDULES", "checkpointing_variants", "count_range", "draft_plans", "make_candidate"]

SEARCHED_SCHEDULES = ("1f1b", "zero-bubble", "interleaved")
"""Schedules that are tried, in this order; the data-aware order is chosen at run time, and never worse."""
MAX_MICROBATCHES = 128
NUM_CHUNKS = 2
"""Stages per pipeline rank of interleaved plans."""


def checkpointing_variants(workload: Workload) -> list[tuple[bool, bool]]:
    """(encoder, LLM) recomputation, least first; a module that keeps nothing for a backward needs none."""
    vision = not ({"vision", "connector"} <= set(workload.frozen) or "vision" in workload.frozen)
    return [(False, False), *([(True, False)] if vision else []), (False, True), *([(True, True)] if vision else [])]


def microbatch_counts(layout: Layout, global_batch_size: int) -> list[int]:
    """Microbatches of a replica that are tried: powers of two, most first, no more than samples; in a pipeline no
    fewer than half its ranks, unless the samples do not go further."""
    most = min(MAX_MICROBATCHES, global_batch_size // layout.l_dp)
    if not most:
        return []
    counts = [2**k for k in reversed(range(most.bit_length()))]
    depth = layout.l_pp + (layout.v_pp if layout.placement == "disjoint" else 0)
    return [count for count in counts if 2 * count >= depth] or counts[:1]


def count_range(table: LayoutTable, global_batch_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The fewest and the most microbatches that `microbatch_counts` gives, of each layout."""
    most = np.minimum(MAX_MICROBATCHES, np.maximum(1, global_batch_size // table.column("l_dp")))
    most = 2 ** np.floor(np.log2(most)).astype(np.int64)
    fewest = 2 ** np.ceil(np.log2(np.maximum(1, table.depth / 2))).astype(np.int64)
    return np.minimum(fewest, most), most


def draft_plans(layout: Layout, global_batch_size: int, schedules: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(schedule, chunks, microbatches) of a layout."""
    stages = layout.placement != "replicated"
    for schedule in schedules if stages else ("1f1b",):
        chunks = NUM_CHUNKS if schedule == "interleaved" else 1
        if chunks > 1 and layout.l_pp == 1:
            continue
        for count in microbatch_counts(layout, global_batch_size):
            if chunks > 1 and count % layout.l_pp:
                continue
            yield schedule, chunks, count


def make_candidate(
    workload: Workload,
    layout: Layout,
    schedule: str,
    num_chunks: int,
    num_microbatches: int,
    again: tuple[bool, bool],
    *,
    balance: bool = True,
) -> Plan | None:
    """The plan; None where the layers do not fill the stages."""
    try:
        vision, llm = layers_of(workload, layout, Variant(*again, num_chunks))
    except PlanError:
        return None
    return Plan(
        placement=layout.placement,
        vision=ModulePlan(tp=layout.v_tp, dp=layout.v_dp, layers=vision, checkpointing=again[0]),
        llm=ModulePlan(tp=layout.l_tp, dp=layout.l_dp, layers=llm, num_chunks=num_chunks, checkpointing=again[1]),
        num_microbatches=num_microbatches,
        schedule=schedule,
        fsdp_shards=layout.shards,
        frozen=workload.frozen,
        cached_features=workload.cached_features,
        balance=balance,
        padded=workload.padded,
        global_batch_size=len(workload.batches[0]),
    )
