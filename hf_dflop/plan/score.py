"""The score of a plan: expected seconds of a step over the workload's batches, and whether it fits.

In: a plan, a workload, a cluster. Out: seconds of each batch, from the simulator's compiled kernel with transfers, the
bridge, tensor-parallel sums, gradient reduction, fill and drain; bytes of each pipeline rank with its microbatches in
flight.

Assumptions: those of `stage_seconds` and `step`; microbatches run in the order in which the balancer gives them (the
run may find a better one). A rank that waits for nothing else is as slow as its own GPU; a pipeline rank as its
slowest.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.memory import StageMemory
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.compiled import CompiledOrder, compile_schedule, compiled, step_seconds
from hf_dflop.plan.compose import Composer, Composition
from hf_dflop.plan.composed_bound import composed_bound
from hf_dflop.plan.fit_memory import MemoryRule, RankMemories, rank_bytes, rank_memories
from hf_dflop.plan.order_greedy import greedy_actions
from hf_dflop.plan.padded_heads import encoder_share
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.stage_seconds import StageSeconds, first_backward_stage
from hf_dflop.plan.step import plan_stage_ranks, reductions, step_durations
from hf_dflop.plan.workload import Workload

__all__ = ["Scorer"]

FloatArray = npt.NDArray[np.float64]
ROUNDING = 1e-9
"""By which a bound is lowered: it adds the same seconds as the simulator, in another sequence."""


class Scorer:
    """Scores plans on one workload and cluster.

    Args:
        workload (`Workload`), cluster (`Cluster`): for which.
        rule (`MemoryRule`): formats, optimizer, margin.
        wire_bytes (`int`): bytes of a number that is sent.
    """

    def __init__(self, workload: Workload, cluster: Cluster, rule: MemoryRule, *, wire_bytes: int = 2) -> None:
        self.workload, self.cluster, self.rule, self.wire_bytes = workload, cluster, rule, wire_bytes
        self.network = cluster.network
        self.composer = Composer(workload)
        self._memory, self._slowdown = cluster.memory(), cluster.slowdown()
        self.is_mixed = len({group.gpu for group in cluster.groups}) > 1
        self.num_simulated = 0
        self._memories: dict[tuple[object, ...], RankMemories] = {}
        self._stage_memories: dict[object, StageMemory] = {}
        self.bytes_of = lru_cache(maxsize=4096)(self._bytes_of)

    def seconds(self, plan: Plan, batch: int, stages: StageSeconds | None = None) -> float:
        """Seconds of a step with one of the workload's batches; `stages`: those of plan and batch, where at hand."""
        self.num_simulated += 1
        stages = stages or self.stages(plan, batch)
        durations = step_durations(
            plan,
            self.workload.cost,
            stages,
            communication=self.network,
            wire_bytes=self.wire_bytes,
            optimizer_s=self.optimizer_s(plan),
        )
        return step_seconds(self.order(plan), durations)

    def composed_bound(self, plan: Plan, stages: StageSeconds, *, is_part: bool = False) -> float:
        """Seconds that no order of these microbatches goes below, see `composed_bound`."""
        network, wire_bytes = self.network, self.wire_bytes
        after = plan.placement != "replicated"
        sums = reductions(plan, self.workload.spec, network, wire_bytes, after=after)
        found = composed_bound(plan, self.workload.spec, stages, sums, network, wire_bytes, is_part=is_part)
        return (found + self.optimizer_s(plan)) * (1 - ROUNDING)

    def part_bounds(self, plan: Plan, batch: int) -> Iterator[float]:
        """The same of some of the replicas, twice as many each time and never all: where a batch is composed in parts,
        most plans are ruled out by the first, in a fraction of the time."""
        replicas, num = plan.llm.dp, plan.num_microbatches
        if not plan.balance or replicas * num == 1:
            return
        again, objective, weight = self._way_to_compose(plan)
        count = 1
        while count < self.composer.num_parts(replicas):
            made = self.composer.first_parts(batch, again, replicas, num, objective, weight, count)
            yield self.composed_bound(plan, self._stages(plan, made), is_part=True)
            count *= 2

    def all_seconds(self, plan: Plan) -> FloatArray:
        """Seconds of a step with each batch, `(num_batches,)`."""
        return np.array([self.seconds(plan, batch) for batch in range(self.workload.num_batches)])

    def order(self, plan: Plan) -> CompiledOrder:
        """The order of a plan's actions."""
        arguments = (plan_stage_ranks(plan), plan.num_microbatches, first_backward_stage(plan))
        if plan.schedule == "1f1b" and plan.placement == "disjoint" and plan.llm.num_chunks == 1:
            return _one_f_one_b(*arguments)
        return compile_schedule("1f1b" if plan.placement == "replicated" else plan.schedule, *arguments)

    def composed(self, plan: Plan, batch: int) -> Composition:
        """The microbatches of a batch under a plan."""
        again, objective, weight = self._way_to_compose(plan)
        own = plan.placement != "disjoint"
        return self.composer.composition(
            batch, again, plan.llm.dp, plan.num_microbatches, objective, weight, plan.balance, plan.vision.dp, own
        )

    def _way_to_compose(self, plan: Plan) -> tuple[tuple[bool, bool], str, float]:
        """Recomputation, objective, weight of an encoder second."""
        again = (plan.vision.checkpointing, plan.llm.checkpointing)
        weight = self._recomputing(*again)
        if plan.placement == "replicated":
            objective = "step" if plan.fsdp_shards == 1 else "stage"
        elif plan.placement == "colocated":
            objective = "joined"
        else:
            objective = "pipeline"
            weight *= plan.llm.dp * plan.llm.tp * encoder_share(self.workload.spec, plan.vision.tp) / plan.vision.dp
            weight *= _largest(plan.vision.layers, plan.vision.pp) / _largest(plan.llm.layers, plan.llm.pp)
            weight = 2.0 ** (round(2 * math.log2(weight)) / 2)
        return again, objective, weight

    def _recomputing(self, vision: bool, llm: bool) -> float:
        """What recomputation makes of an encoder second, against an LLM second."""
        plain, sums = (self.workload.sums(*again).sum(axis=0) for again in ((False, False), (vision, llm)))
        if not plain[0] or not plain[1:3].sum():
            return 1.0
        return round(float(sums[0] / plain[0] / (sums[1:3].sum() / plain[1:3].sum())), 2)

    def stages(self, plan: Plan, batch: int) -> StageSeconds:
        """Seconds of the microbatches on each stage, on the GPUs that it has."""
        return self._stages(plan, self.composed(plan, batch))

    def _stages(self, plan: Plan, made: Composition) -> StageSeconds:
        forward, backward = [], []
        slow = self._slow(plan)
        whole = encoder_share(self.workload.spec, plan.vision.tp)
        known: dict[object, FloatArray] = {}  # most stages have the same layers

        def seconds(table: FloatArray, way: int, share: float, more: FloatArray | None = None) -> FloatArray:
            key = (id(table), way, share, more is None)
            if key not in known:
                known[key] = table[way] * share if more is None else table[way] * share + more
            return known[key]

        for stage, layers in enumerate(plan.vision.layers):
            share = layers / plan.vision.num_layers * whole * slow[stage]
            forward.append(seconds(made.vision, 0, share))
            backward.append(seconds(made.vision, 1, share))
        for stage, layers in enumerate(plan.llm.layers):
            factor = slow[plan.vision.num_stages + stage] / plan.llm.tp
            last = stage == plan.llm.num_stages - 1
            for way, rows in enumerate((forward, backward)):
                head = made.head[way] * factor if last else None
                rows.append(seconds(made.llm, way, layers / plan.llm.num_layers * factor, head))
        overhead = self.workload.cost.per_microbatch_s / (2 * len(forward))
        return StageSeconds(
            forward=[f + overhead for f in forward] if overhead else forward,
            backward=[b + overhead for b in backward] if overhead else backward,
            image_tokens=made.image_tokens,
            llm_tokens=made.tokens,
            forward_from=made.forward_from,
            backward_from=made.backward_from,
        )

    def _slow(self, plan: Plan) -> list[float]:
        if not self.is_mixed:
            return [1.0] * (plan.vision.num_stages + plan.llm.num_stages)
        return [float(self._slowdown[first:last].max()) for first, last in _spans(plan)]

    # ---- memory -------------------------------------------------------------------------------------------------

    def room(self, plan: Plan) -> FloatArray:
        """Bytes that each pipeline rank may use, `(num_pipeline_ranks,)`: its smallest GPU, less the margin."""
        if not self.is_mixed:
            num_ranks = plan.llm.pp + (plan.vision.pp if plan.placement == "disjoint" else 0)
            return np.full(num_ranks, self._memory[0] * (1 - self.rule.margin) - self.rule.reserve_bytes)
        ranks = plan_stage_ranks(plan)
        room = np.full(max(ranks) + 1, np.inf)
        for rank, (first, last) in zip(ranks, _spans(plan), strict=True):
            room[rank] = min(room[rank], self._memory[first:last].min())
        return room * (1 - self.rule.margin) - self.rule.reserve_bytes

    def _bytes_of(self, plan: Plan, composed: bool) -> tuple[float, ...]:
        """Bytes of each pipeline rank: the most over the batches, or (`composed=False`, quick) at least so many."""
        batches = range(self.workload.num_batches) if composed else range(0)
        return rank_bytes(
            plan,
            self.workload,
            self._held(plan),
            plan_stage_ranks(plan),
            self.order(plan),
            [self.composed(plan, batch) for batch in batches],
        )

    def _held(self, plan: Plan) -> RankMemories:
        vision, llm = plan.vision, plan.llm
        key = (
            plan.placement, vision.tp, llm.tp, vision.layers, llm.layers, llm.num_chunks, vision.checkpointing,
            llm.checkpointing, plan.fsdp_shards,
        )  # fmt: skip
        if key not in self._memories:
            self._memories[key] = rank_memories(plan, self.workload.spec, self.rule, self._stage_memories)
        return self._memories[key]

    def fits(self, plan: Plan, *, composed: bool) -> bool:
        """Whether every rank has room; `composed=False` is quick, and true where the full answer is true."""
        return bool((np.array(self.bytes_of(plan, composed)) <= self.room(plan)).all())

    def need(self, plan: Plan, *, composed: bool) -> float:
        """Needed ÷ available bytes of the fullest rank; `composed` as for `fits`."""
        return float((np.array(self.bytes_of(plan, composed)) / self.room(plan)).max())

    @property
    def largest_room(self) -> float:
        """Bytes that a plan may use on the largest GPU."""
        return float(self._memory.max()) * (1 - self.rule.margin) - self.rule.reserve_bytes

    def optimizer_s(self, plan: Plan) -> float:
        """Seconds of the optimizer: it reads and writes all that it holds, on the rank that holds most."""
        return self._held(plan).optimizer_traffic / self.cluster.reference.memory_bytes_per_s


@lru_cache(maxsize=128)
def _one_f_one_b(stage_rank: tuple[int, ...], num_microbatches: int, first_backward: int) -> CompiledOrder:
    """1F1B of one stage per rank: list scheduling of equal seconds gives it too, without objects."""
    seconds = np.broadcast_to(np.array([1.0, 2.0, 1.0, 1.0])[:, None, None], (4, len(stage_rank), num_microbatches))
    stage, kind, place = greedy_actions(stage_rank, seconds, first_backward_stage=first_backward)
    return compiled(stage, kind, place, stage_rank, first_backward, np.arange(num_microbatches))


def _largest(layers: tuple[int, ...], num_ranks: int) -> float:
    return max(sum(layers[rank::num_ranks]) for rank in range(num_ranks)) / sum(layers)


def _spans(plan: Plan) -> Iterator[tuple[int, int]]:
    """First and last + 1 rank of the cluster that run each stage, the encoder's stages first."""
    disjoint = plan.placement == "disjoint"
    width = plan.vision.tp * plan.vision.dp
    for stage in range(plan.vision.num_stages):
        first = stage % plan.vision.pp * width if disjoint else plan.llm_ranks[0]
        yield first, first + (width if disjoint else plan.llm.tp * plan.llm.dp)
    start, width = (plan.vision.num_ranks if disjoint else 0), plan.llm.tp * plan.llm.dp
    for stage in range(plan.llm.num_stages):
        first = start + stage % plan.llm.pp * width
        yield first, first + width
