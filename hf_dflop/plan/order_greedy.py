"""Orders by list scheduling: a rank that is free starts what is ready, a backward before a forward.

In: the rank of each stage, seconds of every action, a limit on microbatches in flight. Out: the order that this makes.
With equal seconds and one stage per rank it is 1F1B; with the microbatches' own seconds it follows them: a rank whose
input is late runs something else meanwhile.

Source: Graham 1966 (list scheduling); the data-aware order of DFLOP (arXiv 2603.25120) has the same aim.

Assumptions: microbatches pass every stage in the same sequence. It is a rule of thumb, not an optimum.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.timing import greedy

__all__ = ["greedy_actions", "greedy_order"]

KINDS = tuple(Kind)
FloatArray = npt.NDArray[np.float64]


def greedy_actions(
    stage_rank: Sequence[int],
    seconds: FloatArray,
    *,
    transfer: FloatArray | None = None,
    data_ready: FloatArray | None = None,
    max_in_flight: Sequence[int] | None = None,
    first_backward_stage: int = 0,
    split: bool = False,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Stage, kind (place in `Kind`) and microbatch of every action, `(num_actions,)` each, in time.

    Args:
        stage_rank (`Sequence[int]`): `(num_stages,)`, pipeline rank of each stage.
        seconds: `(4, num_stages, num_microbatches)`, of F, B, I, W.
        transfer: `(2, num_stages, num_microbatches)`, to the next stage and to the one before; by default none.
        data_ready: `(num_microbatches,)`, when the first stage's input is there; by default at once.
        max_in_flight (`Sequence[int]`, *optional*):
            `(num_stages,)`, most microbatches of a stage between the start of their forward and the end of their
            backward; by default as in 1F1B: the number of ranks' visits from this stage on.
        first_backward_stage (`int`): stages before it have no backward, and no limit.
        split (`bool`): backwards in two parts (zero bubble).
    """
    num_stages, num_microbatches = seconds.shape[1:]
    if max_in_flight is None:
        max_in_flight = default_in_flight(stage_rank)
    per = num_stages + (2 if split else 1) * (num_stages - first_backward_stage)
    stage, kind, microbatch = np.empty((3, per * num_microbatches), dtype=np.int64)
    count = greedy(
        np.asarray(stage_rank, dtype=np.int64),
        1 + max(stage_rank),
        np.ascontiguousarray(seconds, dtype=np.float64),
        np.zeros((2, num_stages, num_microbatches)) if transfer is None else np.ascontiguousarray(transfer),
        np.zeros(num_microbatches) if data_ready is None else np.ascontiguousarray(data_ready),
        np.maximum(1, np.asarray(max_in_flight, dtype=np.int64)),
        first_backward_stage,
        split,
        stage,
        kind,
        microbatch,
    )
    assert count == stage.size, (count, stage.size)
    return stage, kind, microbatch


def default_in_flight(stage_rank: Sequence[int]) -> tuple[int, ...]:
    """`(num_stages,)`: visits to a rank from each stage to the last; neighbours on one rank are one visit."""
    visits = [(rank, len(list(group))) for rank, group in groupby(stage_rank)]
    return tuple(len(visits) - i for i, (_, size) in enumerate(visits) for _ in range(size))


def greedy_order(
    stage_rank: Sequence[int],
    num_microbatches: int,
    *,
    seconds: FloatArray | None = None,
    transfer: FloatArray | None = None,
    data_ready: FloatArray | None = None,
    max_in_flight: Sequence[int] | None = None,
    first_backward_stage: int = 0,
    split: bool = False,
) -> Order:
    """The order that list scheduling makes; takes what `greedy_actions` does, by default seconds of 1, 2, 1, 1."""
    if seconds is None:
        each = np.array([1.0, 2.0, 1.0, 1.0])
        seconds = np.broadcast_to(each[:, None, None], (4, len(stage_rank), num_microbatches))
    stage, kind, microbatch = greedy_actions(
        stage_rank,
        seconds,
        transfer=transfer,
        data_ready=data_ready,
        max_in_flight=max_in_flight,
        first_backward_stage=first_backward_stage,
        split=split,
    )
    order: Order = [[] for _ in range(1 + max(stage_rank))]
    for s, k, m in zip(stage.tolist(), kind.tolist(), microbatch.tolist(), strict=True):
        order[stage_rank[s]].append(Action(s, KINDS[k], m))
    return order
