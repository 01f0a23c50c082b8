"""The record of a plan: which ranks hold which layers, and how a step is cut and ordered.

A `Plan` is made by the planner, by hand, or read from JSON; the simulator times it and the pipeline runs it. It is a
fact about layout alone: seconds are in `Plan.expected`, which nothing reads to run a step.

Ranks, in order: the encoder's, then the LLM's (`placement="disjoint"`), or the LLM's alone. Within a module
`rank = first + (stage * dp + replica) * tp + shard`: tensor-parallel ranks are neighbours, in one node.

Assumptions: the connector runs with the encoder's last stage; embeddings with the LLM's first stage; final norm, LM
head and loss with its last.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_dflop.errors import PlanError

__all__ = ["PLACEMENTS", "PLAN_SCHEMA_VERSION", "SCHEDULES", "ModulePlan", "Plan"]

PLAN_SCHEMA_VERSION = 1

PLACEMENTS: tuple[str, ...] = ("replicated", "colocated", "disjoint")
"""Where the encoder is: on every LLM rank of a plan without pipeline (DDP, FSDP, HSDP); on the ranks of the LLM's
first stage; on ranks of its own."""

SCHEDULES: tuple[str, ...] = ("1f1b", "interleaved", "zero-bubble", "data-aware")
"""Order of the actions of a pipeline: torch's three, and microbatches ordered by their own simulated times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePlan:
    """How the encoder (with its connector) or the LLM is spread over its ranks.

    Raises:
        PlanError: a degree is not a whole number >= 1, or the layers do not fit the stages.
    """

    tp: int = 1
    """Tensor-parallel ranks of one stage of one replica."""
    dp: int = 1
    """Replicas."""
    layers: tuple[int, ...]
    """Transformer layers of each stage, first to last; `(pp * num_chunks,)`, stage s on pipeline rank s % pp."""
    num_chunks: int = 1
    """Stages per pipeline rank (interleaved schedules)."""
    checkpointing: bool = False
    """Activations are recomputed in the backward."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("tp", "dp", "num_chunks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name} is {value!r}; it must be a whole number >= 1.")
        if not self.layers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in self.layers):
            raise PlanError(f"layers is {self.layers!r}; it must list the layers (>= 0) of each stage.")
        if len(self.layers) % self.num_chunks:
            raise PlanError(
                f"layers lists {len(self.layers)} stages, which {self.num_chunks} chunks per rank do not divide; "
                "give pp * num_chunks numbers."
            )

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def pp(self) -> int:
        """Pipeline ranks of one replica."""
        return len(self.layers) // self.num_chunks

    @property
    def num_layers(self) -> int:
        return sum(self.layers)

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def rank(self, *, stage: int, replica: Any, shard: int = 0) -> Any:
        """Rank within the module of a stage (of all `num_stages`), replica (or array of replicas) and tensor-parallel
        shard."""
        return (stage % self.pp * self.dp + replica) * self.tp + shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A layout of a vision-language model over ranks, and of a step over time.

    Example:
        >>> plan = Plan(vision=ModulePlan(layers=(4,), dp=2), llm=ModulePlan(layers=(3, 3)), num_microbatches=4)
        >>> plan.num_ranks, plan.vision_ranks, plan.llm_ranks, Plan.from_json(plan.to_json()) == plan
        (4, (0, 1), (2, 3), True)

    Raises:
        PlanError: fields contradict each other.
    """

    placement: str = "disjoint"
    """One of `PLACEMENTS`."""
    vision: ModulePlan
    """With "replicated" and "colocated" the encoder's ranks are the LLM's (first-stage) ranks: `dp` is the LLM's."""
    llm: ModulePlan
    num_microbatches: int
    """Microbatches of each LLM replica in a step."""
    schedule: str = "1f1b"
    """One of `SCHEDULES`; without stages to overlap it is ignored."""
    fsdp_shards: int = 1
    """Ranks over which parameters, gradients and optimizer state of one copy are sharded: 1 is DDP, `llm.dp` FSDP,
    less than that HSDP. Above 1 only with "replicated"."""
    frozen: tuple[str, ...] = ()
    """Modules that are not trained: of "vision", "connector", "llm"."""
    cached_features: bool = False
    """The frozen encoder's features are computed once and read from disk: it takes no time in a step."""
    balance: bool = True
    """Microbatches are composed by cost; otherwise as the stock sampler deals them."""
    padded: bool = False
    """Rows of a microbatch are padded to the longest; otherwise packed."""
    global_batch_size: int | None = None
    """Samples of a step, over all replicas."""
    spec_hash: str | None = None
    """Of the `ModelSpec` that it was planned for."""
    expected: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the planner predicted (`step_s`, `peak_bytes`, ...), for people and reports."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if self.placement not in PLACEMENTS:
            raise PlanError(f"placement is {self.placement!r}; use one of {', '.join(PLACEMENTS)}.")
        if self.schedule not in SCHEDULES:
            raise PlanError(f"schedule is {self.schedule!r}; use one of {', '.join(SCHEDULES)}.")
        if isinstance(self.num_microbatches, bool) or not isinstance(self.num_microbatches, int):
            raise PlanError(f"num_microbatches is {self.num_microbatches!r}; it must be a whole number.")
        if self.num_microbatches < 1:
            raise PlanError(f"num_microbatches is {self.num_microbatches}; a step has at least one.")
        if unknown := set(self.frozen) - {"vision", "connector", "llm"}:
            raise PlanError(f"frozen names {sorted(unknown)}; the modules are vision, connector and llm.")
        if self.placement != "disjoint" and (self.vision.dp != self.llm.dp or self.vision.num_stages != 1):
            raise PlanError(
                f"{self.placement} puts the encoder, whole, on the LLM's ranks: vision needs one stage and "
                f"dp={self.llm.dp}; it has {self.vision.num_stages} stages and dp={self.vision.dp}."
            )
        if self.placement == "replicated" and self.llm.num_stages != 1:
            raise PlanError(
                f"replicated has no pipeline, but the LLM has {self.llm.num_stages} stages: use colocated."
            )
        if self.fsdp_shards < 1 or self.llm.dp % self.fsdp_shards:
            raise PlanError(f"fsdp_shards is {self.fsdp_shards}; it must divide the {self.llm.dp} replicas.")
        if self.fsdp_shards > 1 and self.placement != "replicated":
            raise PlanError('fsdp_shards above 1 goes with placement "replicated" alone.')
        if self.cached_features and "vision" not in self.frozen:
            raise PlanError('cached_features needs a frozen encoder: put "vision" into frozen.')
        if self.global_batch_size is not None and self.global_batch_size < self.llm.dp * self.num_microbatches:
            raise PlanError(
                f"global_batch_size is {self.global_batch_size}, fewer samples than the {self.llm.dp} replicas × "
                f"{self.num_microbatches} microbatches; use fewer microbatches."
            )

    @property
    def num_ranks(self) -> int:
        return self.llm.num_ranks + (self.vision.num_ranks if self.placement == "disjoint" else 0)

    @property
    def vision_ranks(self) -> tuple[int, ...]:
        """Ranks that run the encoder, in order of (stage, replica, shard)."""
        if self.placement == "disjoint":
            return tuple(range(self.vision.num_ranks))
        return self.llm_ranks[: self.llm.dp * self.llm.tp]

    @property
    def llm_ranks(self) -> tuple[int, ...]:
        """Ranks that run the LLM, in order of (pipeline rank, replica, shard)."""
        first = self.vision.num_ranks if self.placement == "disjoint" else 0
        return tuple(range(first, first + self.llm.num_ranks))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, with the schema version."""
        return {"schema_version": PLAN_SCHEMA_VERSION, **asdict(self), "expected": dict(self.expected)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Inverse of `to_dict`.

        Raises:
            PlanError: another schema version, a missing or unknown field, or fields that contradict each other.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != PLAN_SCHEMA_VERSION:
            raise PlanError(
                f"the plan has schema version {version!r}; hf_dflop here reads {PLAN_SCHEMA_VERSION}. "
                "Plan again, or use the hf_dflop that wrote it."
            )
        try:
            fields["vision"] = ModulePlan(**fields["vision"])
            fields["llm"] = ModulePlan(**fields["llm"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan is not readable ({error}). Plan again.") from error

    def to_json(self) -> str:
        """The plan as a JSON string that a person can read and edit."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Inverse of `to_json`; raises what `from_dict` raises."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not JSON ({error}).") from error
        if not isinstance(data, dict):
            raise PlanError("the plan is not a JSON object.")
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON to `path`."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote or a person edited; raises what `from_dict` raises."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
