"""Bytes of each line of a step: what its parts always take, and what microbatches in flight hold.

In: a plan, a model's spec, formats (`MemorySettings`), the samples of each microbatch. Out: a `StepMemory`, whose
`kept` and `put_off` are the `activation_bytes` and `put_off_bytes` of `simulate_order`.

Assumptions: those of `hf_dflop.cost.memory` (no fragmentation, context or communication buffers: leave a reserve); an
encoder's replica holds an even share of a microbatch's images.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import ModelSpec, Trainable
from hf_dflop.cost.memory import MemorySettings, MicrobatchCounts, stage_memory
from hf_dflop.plan.padded_heads import padded_encoder
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.stage_parts import stage_parts
from hf_dflop.plan.stage_seconds import Groups
from hf_dflop.plan.step import plan_stage_ranks
from hf_dflop.plan.timeline import Timeline
from hf_dflop.shapes import Shapes

__all__ = ["StepMemory", "plan_memory_settings", "step_memory"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepMemory:
    """Bytes of a step."""

    kept: list[FloatArray]
    """One per stage, `(num_replicas, num_microbatches)`: held from forward to backward."""
    extra: list[FloatArray]
    """The same: needed beside, while the microbatch computes."""
    put_off: list[FloatArray]
    """The same: held beside between the two parts of a split backward."""
    static: FloatArray
    """`(num_stages,)`: parameters, gradients, optimizer, gathered layers."""
    stage_rank: tuple[int, ...]

    def peak_bytes(self, timeline: Timeline) -> FloatArray:
        """`(num_lines,)`: the most that each line holds, of a timeline simulated with `kept` and `put_off`."""
        assert timeline.peak_bytes is not None
        peaks = timeline.peak_bytes.copy()
        for i, (rank, replica) in enumerate(timeline.lines):
            own = [stage for stage, at in enumerate(self.stage_rank) if at == rank]
            peaks[i] += sum(self.static[stage] for stage in own)
            peaks[i] += max(self.extra[stage][replica].max() for stage in own)
        return peaks


def plan_memory_settings(plan: Plan, settings: MemorySettings | None = None) -> MemorySettings:
    """Formats and optimizer from `settings`; what is trained, recomputed and sharded from the plan."""
    given = settings or MemorySettings()
    frozen = set(plan.frozen)
    return replace(
        given,
        trainable=replace(
            given.trainable if settings else Trainable(),
            vision="vision" not in frozen,
            connector="connector" not in frozen,
            llm="llm" not in frozen,
        ),
        vision_checkpointing=plan.vision.checkpointing,
        llm_checkpointing=plan.llm.checkpointing,
        zero_stage=3 if plan.fsdp_shards > 1 else given.zero_stage,
        shards=plan.fsdp_shards if plan.fsdp_shards > 1 else given.shards,
    )


def step_memory(
    plan: Plan, spec: ModelSpec, shapes: Shapes, groups: Groups, settings: MemorySettings | None = None
) -> StepMemory:
    """Bytes of the microbatches `groups` on each stage.

    Args:
        plan (`Plan`), spec (`ModelSpec`), shapes (`Shapes`): layout, model, samples of the global batch.
        groups: LLM replica -> microbatch -> samples.
        settings (`MemorySettings`, *optional*): formats and optimizer; bf16 with fp32 master weights and AdamW.
    """
    used = plan_memory_settings(plan, settings)
    whole = padded_encoder(spec, plan.vision.tp)
    parts = stage_parts(plan)
    flat = [group for rank in groups for group in rank]
    counts = MicrobatchCounts.of(spec, shapes, flat, padded=plan.padded)
    table = np.array([counts.vision_tokens, counts.vision_pairs, counts.llm_tokens, counts.llm_pairs])
    table = table.reshape(4, plan.llm.dp, plan.num_microbatches)
    kept, extra, put_off, static = [], [], [], []
    for stage, held in enumerate(parts):
        memory = stage_memory(whole, held, used, vision_tp=plan.vision.tp, llm_tp=plan.llm.tp)
        own: Any = table
        if stage < plan.vision.num_stages and plan.placement == "disjoint":
            own = np.repeat(table.sum(axis=1, keepdims=True) / plan.vision.dp, plan.vision.dp, axis=1)
        here = MicrobatchCounts(vision_tokens=own[0], vision_pairs=own[1], llm_tokens=own[2], llm_pairs=own[3])
        kept.append(np.asarray(memory.kept_bytes(here), dtype=np.float64))
        extra.append(np.asarray(memory.extra_bytes(here), dtype=np.float64))
        waits = np.asarray(memory.put_off_bytes(here), dtype=np.float64)
        put_off.append(waits if stage else np.zeros_like(waits))  # without an input, no backward is split
        static.append(memory.static_bytes)
    return StepMemory(
        kept=kept, extra=extra, put_off=put_off, static=np.array(static), stage_rank=plan_stage_ranks(plan)
    )
