"""Does a plan fit? Bytes of each pipeline rank of a plan.

In: a plan, its microbatches, its order. Out: bytes of the fullest GPU of each pipeline rank: what
`hf_dflop.cost.memory` says of parameters, gradients, optimizer state and of a microbatch's activations, the latter
for as many microbatches as the order has in flight, the largest ones of a replica.

Assumptions: attention keeps no scores (SDPA, flash attention); in-flight microbatches are the largest ones at once,
which is safe and seldom exact.
"""

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
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.workload import Workload

__all__ = ["MemoryRule", "in_flight", "rank_bytes", "static_bytes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRule:
    """What decides whether a plan fits, beside the plan."""

    settings: MemorySettings = field(default_factory=MemorySettings)
    """Formats and optimizer; what a plan says itself (recomputation, sharding, what is trained) is the plan's."""
    margin: float = 0.08
    """Share of a GPU's memory that is left free, for fragmentation."""
    reserve_bytes: float = 1.5 * 2**30
    """For the driver's context and communication buffers."""

    def settings_of(self, plan: Plan) -> MemorySettings:
        """The settings under a plan."""
        return replace(
            self.settings,
            trainable=Trainable(
                vision="vision" not in plan.frozen,
                connector="connector" not in plan.frozen,
                llm="llm" not in plan.frozen,
            ),
            vision_checkpointing=plan.vision.checkpointing,
            llm_checkpointing=plan.llm.checkpointing,
            zero_stage=3 if plan.fsdp_shards > 1 else 0,
            shards=plan.fsdp_shards,
        )

    def optimizer_traffic_bytes(self, plan: Plan, spec: ModelSpec) -> float:
        """Bytes that the optimizer reads and writes on the rank that holds most."""
        settings = self.settings_of(plan)
        held = [_memory(spec, layers, settings, *tp) for layers, *tp in _rank_layers(plan)]
        return max(
            2 * memory.optimizer_bytes + 2 * memory.parameters_bytes + memory.gradients_bytes for memory in held
        )


@lru_cache(maxsize=65536)
def _memory(spec: ModelSpec, layers: StageLayers, settings: MemorySettings, v_tp: int, l_tp: int) -> StageMemory:
    return stage_memory(spec, layers, settings, vision_tp=v_tp, llm_tp=l_tp)


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


@lru_cache(maxsize=4096)
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


def _largest_sums(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`(replicas, M)` counts → `(M,)`: the most that the k + 1 largest microbatches of a replica have together."""
    return np.cumsum(np.sort(counts, axis=1)[:, ::-1], axis=1).max(axis=0)


def static_bytes(plan: Plan, spec: ModelSpec, rule: MemoryRule) -> tuple[float, ...]:
    """Bytes of each pipeline rank before any microbatch: parameters, gradients, optimizer state."""
    settings = rule.settings_of(plan)
    return tuple(_memory(spec, layers, settings, *tp).static_bytes for layers, *tp in _rank_layers(plan))


def rank_bytes(
    plan: Plan,
    workload: Workload,
    rule: MemoryRule,
    stage_rank: tuple[int, ...],
    order: CompiledOrder,
    batches: list[Composition],
) -> tuple[float, ...]:
    """Bytes of each pipeline rank.

    Args:
        plan (`Plan`), workload (`Workload`), rule (`MemoryRule`): of one model.
        stage_rank: pipeline rank of each stage.
        order (`CompiledOrder`): how many microbatches are in flight.
        batches (`list[Composition]`): the microbatches that run; without them a lower limit.

    Returns:
        `(num_pipeline_ranks,)`; a pipeline rank's stages are counted as if each were at its fullest at the same time.
    """
    settings = rule.settings_of(plan)
    memories = [_memory(workload.spec, layers, settings, *tp) for layers, *tp in _rank_layers(plan)]
    num_vision = plan.vision.num_stages
    flying = in_flight(order)
    if batches:
        sums_of = [(_largest_sums(made.positions), _largest_sums(made.tokens)) for made in batches]
    else:  # the k largest microbatches of the fullest replica hold no less than k mean ones
        counts = np.arange(1, plan.num_microbatches + 1) / plan.num_microbatches
        sums_of = [
            (counts * batch.image_patches.sum() / plan.vision.dp, counts * batch.llm_tokens.sum() / plan.llm.dp)
            for batch in workload.batches
        ]
    total = np.zeros((len(sums_of), len(memories)))
    for b, (positions, tokens) in enumerate(sums_of):
        for rank, memory in enumerate(memories):
            bytes_ = memory.static_bytes
            own = [stage for stage, at in enumerate(stage_rank) if at == rank]
            for module, sums, part in (("vision", positions, memory.vision), ("llm", tokens, memory.llm)):
                stages = [stage for stage in own if (stage < num_vision) == (module == "vision")]
                if not stages:
                    continue
                # layers of a rank's stages are alike: kept bytes go with each stage's share of them
                count = sum(sums[min(flying[stage], sums.size) - 1] for stage in stages) / len(stages)
                bytes_ += part.kept_per_token_bytes * count + part.extra_per_token_bytes * sums[0]
            total[b, rank] = bytes_
    return tuple(total.max(axis=0).tolist())
