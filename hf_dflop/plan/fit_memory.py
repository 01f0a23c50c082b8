"""Does a plan fit? Bytes of each pipeline rank of a plan.

In: a plan, its microbatches, its order. Out: bytes of the fullest GPU of each pipeline rank: what
`hf_dflop.cost.memory` says of parameters, gradients, optimizer state and of a microbatch's activations, the latter
for as many microbatches as the order has in flight, the largest ones of a replica.

Assumptions: attention keeps no scores (SDPA, flash attention); in-flight microbatches are the largest ones at once,
which is safe and seldom exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.flops import Trainable
from hf_dflop.cost.memory import MemorySettings, StageLayers, StageMemory, stage_memory
from hf_dflop.cost.spec import ModelSpec
from hf_dflop.plan.actions import Kind
from hf_dflop.plan.compiled import KIND_CODE, CompiledOrder
from hf_dflop.plan.compose import Composition
from hf_dflop.plan.padded_heads import padded_encoder
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.workload import Workload

__all__ = ["MemoryRule", "RankMemories", "in_flight", "rank_bytes", "rank_memories"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRule:
    """What decides whether a plan fits, beside the plan."""

    settings: MemorySettings = field(default_factory=MemorySettings)
    """Formats and optimizer; what a plan says itself (recomputation, sharding, what is trained) is the plan's."""
    margin: float = 0.08
    """Share of a GPU's memory that is left free, for fragmentation."""
    reserve_bytes: float = 1.5 * 2**30
    """For the driver's context and communication buffers."""

    def settings_of(self, frozen: Sequence[str], again: tuple[bool, bool], shards: int) -> MemorySettings:
        """The settings with these modules frozen, (encoder, LLM) recomputation, and FSDP over so many shards."""
        return replace(
            self.settings,
            trainable=Trainable(
                vision="vision" not in frozen,
                connector="connector" not in frozen,
                llm="llm" not in frozen,
            ),
            vision_checkpointing=again[0],
            llm_checkpointing=again[1],
            zero_stage=3 if shards > 1 else 0,
            shards=shards,
        )


def _rank_layers(plan: Plan) -> list[tuple[StageLayers, int, int]]:
    """What each pipeline rank holds, and the tensor-parallel degrees."""
    found: list[tuple[StageLayers, int, int]] = []
    tp = (plan.vision.tp, plan.llm.tp)
    num = plan.vision.num_stages
    if plan.placement == "disjoint":
        for stage in range(num):
            held = StageLayers(
                vision_layers=plan.vision.layers[stage], vision_fixed=stage == 0, connector=stage == num - 1
            )
            found.append((held, *tp))
    colocated = plan.placement != "disjoint" and not plan.cached_features
    for rank in range(plan.llm.pp):
        encoder = colocated and rank == 0
        held = StageLayers(
            vision_layers=plan.vision.num_layers if encoder else 0,
            vision_fixed=encoder,
            connector=plan.placement != "disjoint" and rank == 0,
            llm_layers=sum(plan.llm.layers[rank :: plan.llm.pp]),
            llm_fixed=rank == 0,
            llm_head=rank == plan.llm.pp - 1,
        )
        found.append((held, *tp))
    return found


@lru_cache(maxsize=128)
def in_flight(order: CompiledOrder) -> npt.NDArray[np.int64]:
    """Most microbatches of each stage between the start of their forward and the end of their backward,
    `(num_stages,)`; 1 for a stage without backward."""
    forward, last = KIND_CODE[Kind.FORWARD], KIND_CODE[Kind.BACKWARD_INPUT]
    found = np.ones(order.stage_rank.size, dtype=np.int64)
    for stage in range(order.first_backward, order.stage_rank.size):
        kinds = order.kind[order.stage == stage]
        change = np.where(kinds == forward, 1, np.where(kinds == last, 0, -1))
        found[stage] = np.cumsum(change).max()
    return found


@lru_cache(maxsize=128)
def put_off(order: CompiledOrder) -> npt.NDArray[np.int64]:
    """Most microbatches of each stage between the two parts of their backward, `(num_stages,)`; none of the first
    stage, which has no input to split by."""
    first, last = KIND_CODE[Kind.BACKWARD_INPUT], KIND_CODE[Kind.BACKWARD_WEIGHT]
    found = np.zeros(order.stage_rank.size, dtype=np.int64)
    for stage in range(max(order.first_backward, 1), order.stage_rank.size):
        kinds = order.kind[order.stage == stage]
        found[stage] = np.cumsum(np.where(kinds == first, 1, np.where(kinds == last, -1, 0))).max()
    return found


@dataclass(frozen=True, slots=True, eq=False)
class RankMemories:
    """What `rank_bytes` needs of the layers of each pipeline rank, `(num_pipeline_ranks,)` each, in bytes."""

    static: npt.NDArray[np.float64]
    kept: npt.NDArray[np.float64]
    """`(2, num_pipeline_ranks)`: per encoder position, per LLM token, from forward to backward."""
    extra: npt.NDArray[np.float64]
    """The same, while a microbatch computes."""
    put_off: npt.NDArray[np.float64]
    """The same, between the two parts of a split backward."""
    optimizer_traffic: float
    """That the optimizer reads and writes, on the rank that holds most."""


def rank_memories(
    plan: Plan, spec: ModelSpec, rule: MemoryRule, made: dict[object, StageMemory] | None = None
) -> RankMemories:
    """Of a plan's layers; replicas, microbatches and the schedule make no difference. `made`: what ranks hold, kept
    between plans of one model and rule."""
    settings = rule.settings_of(plan.frozen, (plan.vision.checkpointing, plan.llm.checkpointing), plan.fsdp_shards)
    made = {} if made is None else made  # most ranks of a pipeline hold the same
    ways = (plan.frozen, plan.vision.checkpointing, plan.llm.checkpointing, plan.fsdp_shards)
    held = []
    for layers, v_tp, l_tp in _rank_layers(plan):
        key = (layers, v_tp, l_tp, ways)
        if key not in made:
            held_spec = padded_encoder(spec, v_tp)
            made[key] = stage_memory(held_spec, layers, settings, vision_tp=v_tp, llm_tp=l_tp)
        held.append(made[key])
    return RankMemories(
        np.array([one.static_bytes for one in held]),
        np.array([[getattr(one, name).kept_per_token_bytes for one in held] for name in ("vision", "llm")]),
        np.array([[getattr(one, name).extra_per_token_bytes for one in held] for name in ("vision", "llm")]),
        np.array([[getattr(one, name).put_off_per_token_bytes for one in held] for name in ("vision", "llm")]),
        max(2 * one.optimizer_bytes + 2 * one.parameters_bytes + one.gradients_bytes for one in held),
    )


def rank_bytes(
    plan: Plan,
    workload: Workload,
    held: RankMemories,
    stage_rank: tuple[int, ...],
    order: CompiledOrder,
    batches: list[Composition],
) -> tuple[float, ...]:
    """Bytes of each pipeline rank.

    Args:
        plan (`Plan`), workload (`Workload`): of one model.
        held (`RankMemories`): of the plan's layers.
        stage_rank: pipeline rank of each stage.
        order (`CompiledOrder`): how many microbatches are in flight.
        batches (`list[Composition]`): the microbatches that run; without them a lower limit.

    Returns:
        `(num_pipeline_ranks,)`; a pipeline rank's stages are counted as if each were at its fullest at the same time.
    """
    if batches:
        sums_of = [made.largest for made in batches]
    else:  # the k largest microbatches of the fullest replica hold no less than k mean ones
        counts = np.arange(1, plan.num_microbatches + 1) / plan.num_microbatches
        sums_of = [
            (counts * batch.image_patches.sum() / plan.vision.dp, counts * batch.llm_tokens.sum() / plan.llm.dp)
            for batch in workload.batches
        ]
    ranks = np.array(stage_rank)
    flying = np.minimum(in_flight(order), plan.num_microbatches) - 1
    waiting = np.minimum(put_off(order), plan.num_microbatches)
    num_ranks, num_vision = held.static.size, plan.vision.num_stages
    most = np.zeros(num_ranks)
    modules = (slice(0, num_vision), slice(num_vision, None))
    numbers = [np.bincount(ranks[own], minlength=num_ranks) for own in modules]
    for sums in sums_of:
        total = held.static.copy()
        for module, own in enumerate(modules):
            # layers of a rank's stages are alike: kept bytes go with each stage's share of them
            count = np.bincount(ranks[own], sums[module][flying[own]], num_ranks) / np.maximum(numbers[module], 1)
            if waiting[own].any():
                beside = np.where(waiting[own] > 0, sums[module][np.maximum(waiting[own] - 1, 0)], 0.0)
                split = np.bincount(ranks[own], beside, num_ranks) / np.maximum(numbers[module], 1)
                total += held.put_off[module] * split
            total += held.kept[module] * count + held.extra[module] * sums[module][0] * (numbers[module] > 0)
        np.maximum(most, total, out=most)
    return tuple(most.tolist())
