"""What a step cannot go below once its microbatches are known: all but transfers and most of the waiting.

In: a plan, the seconds of its microbatches on each stage, what sums and gathers of parameters take. Out: seconds. Of
each pipeline rank and replica: the first microbatch's way there, all that it computes with its tensor-parallel sums,
its sum of gradients. In 1F1B the last microbatch is the last everywhere: its way back comes after that. Under FSDP the
replicas that share parameters run every action together: the slowest of them counts, or gathering.

Assumptions: the first microbatch stays the first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import ModelSpec
from hf_dflop.plan.network import Communication
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.stage_seconds import StageSeconds, first_backward_stage
from hf_dflop.plan.step import plan_stage_ranks

__all__ = ["composed_bound"]

FloatArray = npt.NDArray[np.float64]


class _Row(NamedTuple):
    """Of a stage, `(num_replicas,)` each."""

    busy: FloatArray
    """Of all microbatches, forward and backward."""
    first: FloatArray
    """Forward of the first."""
    last: FloatArray
    """Backward of the last."""


def composed_bound(
    plan: Plan,
    spec: ModelSpec,
    stages: StageSeconds,
    sums: dict[str, Any],
    communication: Communication,
    wire_bytes: int,
    *,
    is_part: bool = False,
) -> float:
    """Seconds, without the optimizer, that no order of these microbatches goes below.

    Args:
        plan (`Plan`), spec (`ModelSpec`): what runs.
        stages (`StageSeconds`): of all replicas, or of the first ones.
        sums: what `reductions` says of the plan.
        communication (`Communication`), wire_bytes (`int`): of tensor-parallel sums.
        is_part (`bool`): the stages are those of the first LLM replicas alone; what an encoder on ranks of its own
            has to do is then not known.
    """
    per_layer = _tensor_sums(plan, spec, stages, communication, wire_bytes)
    tail_s, ranks, num_vision = sums["reduce_tail_s"], plan_stage_ranks(plan), plan.vision.num_stages
    if plan.fsdp_shards > 1:
        return _in_lockstep(plan, stages, per_layer, sums) + float(tail_s[0])
    rows = _rows(plan, stages, per_layer)
    drains = plan.schedule == "1f1b" and plan.llm.num_chunks == 1 and plan.placement != "replicated"
    if plan.placement != "disjoint":
        return _of_ranks(rows, ranks, tail_s, drains)[0]
    own, found = slice(num_vision, None), 0.0
    way, beyond = np.zeros(1), np.zeros(1)
    if not is_part:
        found, encoded, back = _of_ranks(rows[:num_vision], ranks[:num_vision], tail_s, drains)
        # an LLM replica waits for the encoder replicas that have its first images, and those of its last for it
        low, high = stages.forward_from[:, 0].T
        most = np.maximum(encoded[np.minimum(low, encoded.size - 1)], encoded[np.maximum(high - 1, 0)])
        way = np.where(high > low, most, 0.0)
        if first_backward_stage(plan) == 0:
            low, high = stages.forward_from[:, -1].T
            beyond = np.where(high > low, back.min() + tail_s[0], 0.0)
    return max(found, _of_ranks(rows[own], ranks[own], tail_s, drains, way, beyond)[0])


def _of_ranks(
    rows: Sequence[_Row],
    ranks: Sequence[int],
    tail_s: FloatArray,
    drains: bool,
    way: FloatArray | float = 0.0,
    beyond: FloatArray | float = 0.0,
) -> tuple[float, FloatArray, FloatArray]:
    """The bound of stages in a row; the first microbatch's way through them, and the last one's way back.

    Args:
        rows, ranks: of the stages. tail_s: of each rank, what its sum of gradients shows.
        drains: the last microbatch comes back through all of them after everything else.
        way, beyond: before the first stage, and after its last backward, `(num_replicas,)`.
    """
    busy: dict[int, Any] = {}
    for row, rank in zip(rows, ranks, strict=True):
        busy[rank] = busy.get(rank, 0.0) + row.busy
    found = 0.0
    through: Any = way
    back: Any = 0.0
    for stage, (row, rank) in enumerate(zip(rows, ranks, strict=True)):
        if ranks.index(rank) == stage:
            end = through + busy[rank]
            found = max(found, float(end.max()) + float(tail_s[rank]))
            if drains:
                end = end + back
                found = max(found, float(end.max()) + float(tail_s[ranks[0]]), float((end + beyond).max()))
        through, back = through + row.first, back + row.last
    return found, through, back


def _rows(plan: Plan, stages: StageSeconds, per_layer: Sequence[FloatArray | None]) -> list[_Row]:
    known: dict[object, tuple[FloatArray, bool]] = {}  # most stages have the same arrays

    def summed(values: FloatArray) -> tuple[FloatArray, bool]:
        if id(values) not in known:
            known[id(values)] = values.sum(axis=1), bool(values.any())
        return known[id(values)]

    found = []
    modules = [(plan.vision, per_layer[0])] * plan.vision.num_stages + [(plan.llm, per_layer[1])] * plan.llm.num_stages
    layers = (*plan.vision.layers, *plan.llm.layers)
    for stage, (module, sums) in enumerate(modules):
        forward, backward = stages.forward[stage], stages.backward[stage]
        busy, first, last = summed(forward)[0] + summed(backward)[0], forward[:, 0], backward[:, -1]
        if sums is not None:
            again = (2 if module.checkpointing else 1) * summed(backward)[1]
            busy = busy + (1 + again) * layers[stage] * summed(sums)[0]
            first, last = first + layers[stage] * sums[:, 0], last + again * layers[stage] * sums[:, -1]
        found.append(_Row(busy, first, last))
    return found


def _tensor_sums(
    plan: Plan, spec: ModelSpec, stages: StageSeconds, communication: Communication, wire_bytes: int
) -> tuple[FloatArray | None, FloatArray | None]:
    """Seconds of a layer's tensor-parallel sums in one direction, encoder and LLM, `(replicas or 1, microbatches)`."""

    def of(tp: int, width: int, positions: FloatArray) -> FloatArray | None:
        if tp == 1:
            return None
        seconds = communication.all_reduce_s(positions * (width * wire_bytes), range(tp))
        return 2.0 * np.where(positions > 0, seconds, 0.0)

    images = stages.image_tokens.sum(axis=0, keepdims=True) * spec.connector.merge / plan.vision.dp
    return of(plan.vision.tp, spec.vision.hidden, images), of(plan.llm.tp, spec.llm.hidden, stages.llm_tokens)


def _in_lockstep(
    plan: Plan, stages: StageSeconds, per_layer: Sequence[FloatArray | None], sums: dict[str, Any]
) -> float:
    """Of one rank with both modules: the most that the replicas of a shard group take together."""
    found: Any = 0.0
    first_backward = first_backward_stage(plan)
    for stage, module in enumerate((plan.vision, plan.llm)):
        again = (2 if module.checkpointing else 1) * bool(stages.backward[stage].any())
        ways = [(stages.forward[stage], sums["floor_forward_s"][stage], 1)]
        if stage >= first_backward:
            ways.append((stages.backward[stage], sums["floor_backward_s"][stage], again))
        for rows, floor, times in ways:
            more = per_layer[stage]
            if more is not None:
                rows = rows + times * module.num_layers * more
            shards = min(plan.fsdp_shards, len(rows))
            together = rows[: len(rows) // shards * shards].reshape(-1, shards, rows.shape[1]).max(axis=1)
            found = found + np.maximum(together, floor).sum(axis=1)
    return float(found.max())
