"""Which rank runs which stages for which replica, and the process groups of a plan.

Stages count through the whole model: first the encoder's (the connector is with its last), then the LLM's. A *column*
is a pipeline rank: the stages that one rank of a replica runs. Encoder and LLM may have different numbers of replicas.
A *shard* is one of the tensor-parallel ranks that run a stage of a replica together.

In: a plan. Out: stage → column, (stage, replica, shard) → rank, rank → place. Ranks are those of the plan, from 0.

Assumption: an encoder rank has one stage (refused here).
"""

from dataclasses import dataclass, field

from hf_dflop.errors import PlanError
from hf_dflop.plan.plan import Plan

__all__ = ["Place", "Topology"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank of the plan stands."""

    rank: int
    column: int
    replica: int
    stages: tuple[int, ...]
    shard: int = 0
    first_llm_stage: int = field(default=1, repr=False)

    @property
    def encodes(self) -> bool:
        """Whether this rank runs a stage of the encoder, so needs pixels."""
        return self.stages[0] < self.first_llm_stage

    @property
    def is_llm(self) -> bool:
        """Whether this rank runs a stage of the LLM, so needs text."""
        return self.stages[-1] >= self.first_llm_stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """The ranks of a plan.

    Example:
        >>> from hf_dflop.plan import ModulePlan, Plan
        >>> plan = Plan(vision=ModulePlan(layers=(2,), dp=2), llm=ModulePlan(layers=(2, 2)), num_microbatches=4)
        >>> topology = Topology(plan=plan)
        >>> topology.stage_columns, topology.place(3)
        ((0, 1, 2), Place(rank=3, column=2, replica=0, stages=(2,), shard=0))

    Raises:
        PlanError: a plan that the pipeline cannot run.
    """

    plan: Plan

    def __post_init__(self) -> None:
        plan = self.plan
        if not self.disjoint and plan.vision.tp not in (1, plan.llm.tp):
            raise PlanError(
                f"vision.tp is {plan.vision.tp} on the LLM's ranks, whose tp is {plan.llm.tp}: use the same, or 1 "
                "(each of these ranks then runs the whole encoder)."
            )
        if plan.vision.num_chunks != 1:
            raise PlanError(
                f"vision.num_chunks is {plan.vision.num_chunks}; an encoder rank runs one stage: set it to 1."
            )
        if plan.fsdp_shards != 1:
            raise PlanError(
                f"fsdp_shards is {plan.fsdp_shards}; the pipeline keeps whole parameters of a stage on each of its "
                "ranks. Run such a plan with Trainer and FSDP."
            )
        if plan.cached_features:
            raise PlanError("cached_features is set; the pipeline runs the encoder itself: unset it.")

    @property
    def disjoint(self) -> bool:
        return self.plan.placement == "disjoint"

    @property
    def first_llm_stage(self) -> int:
        return self.plan.vision.num_stages

    @property
    def num_stages(self) -> int:
        return self.first_llm_stage + self.plan.llm.num_stages

    @property
    def last_stage(self) -> int:
        return self.num_stages - 1

    @property
    def stage_columns(self) -> tuple[int, ...]:
        """Column of each stage."""
        first = self.first_llm_stage if self.disjoint else 0
        llm = (first + stage % self.plan.llm.pp for stage in range(self.plan.llm.num_stages))
        return (*range(self.first_llm_stage), *llm)

    @property
    def num_columns(self) -> int:
        return self.plan.llm.pp + (self.first_llm_stage if self.disjoint else 0)

    def replicas(self, stage: int) -> int:
        """Replicas of a stage."""
        return self.plan.vision.dp if stage < self.first_llm_stage else self.plan.llm.dp

    def num_shards(self, stage: int) -> int:
        """Ranks that run a stage of a replica together; an encoder that is not cut runs whole on each of the LLM's."""
        own = stage < self.first_llm_stage and self.disjoint
        return self.plan.vision.tp if own else self.plan.llm.tp

    def rank(self, stage: int, replica: int, shard: int = 0) -> int:
        """The plan's rank that runs a stage for a replica."""
        if stage < self.first_llm_stage and self.disjoint:
            return self.plan.vision_ranks[self.plan.vision.rank(stage=stage, replica=replica, shard=shard)]
        at = max(stage - self.first_llm_stage, 0)
        return self.plan.llm_ranks[self.plan.llm.rank(stage=at, replica=replica, shard=shard)]

    def shards(self, stage: int, replica: int) -> tuple[int, ...]:
        """The tensor-parallel ranks of a stage of a replica."""
        return tuple(self.rank(stage, replica, shard) for shard in range(self.num_shards(stage)))

    def sender(self, stage: int, replica: int, shard: int) -> int:
        """The rank of `stage` from which shard `shard` of a neighbouring stage receives. All shards hold the same."""
        return self.rank(stage, replica, shard % self.num_shards(stage))

    def receivers(self, stage: int, replica: int, shard: int, num_shards: int) -> tuple[int, ...]:
        """The ranks of `stage` to which shard `shard` of the `num_shards` of a neighbouring stage sends."""
        return self.shards(stage, replica)[shard::num_shards]

    def place(self, rank: int) -> Place:
        """Where a rank of the plan stands."""
        for column in range(self.num_columns):
            stages = tuple(stage for stage, at in enumerate(self.stage_columns) if at == column)
            for replica in range(self.replicas(stages[-1])):
                shards = self.shards(stages[-1], replica)
                if rank in shards:
                    return Place(
                        rank=rank,
                        column=column,
                        replica=replica,
                        stages=stages,
                        shard=shards.index(rank),
                        first_llm_stage=self.first_llm_stage,
                    )
        raise PlanError(f"rank {rank} is not one of the plan's {self.plan.num_ranks} ranks.")

    def copies(self) -> list[tuple[int, ...]]:
        """For each column and shard, the ranks that hold copies of the same parameters."""
        firsts = [self.stage_columns.index(column) for column in range(self.num_columns)]
        return [
            tuple(self.rank(stage, replica, shard) for replica in range(self.replicas(stage)))
            for stage in firsts
            for shard in range(self.num_shards(stage))
        ]

    def tensor_groups(self) -> list[tuple[int, ...]]:
        """For each column and replica, its tensor-parallel ranks."""
        firsts = [self.stage_columns.index(column) for column in range(self.num_columns)]
        return [self.shards(stage, replica) for stage in firsts for replica in range(self.replicas(stage))]
