"""How many bytes one rank needs: parameters, gradients, optimizer state, activations, logits.

In: a `ModelSpec`, the layers that the rank holds (`StageLayers`), how it trains (`MemorySettings`), and, where the
model was measured, its `ModelProfile`. Out: a `StageMemory`, whose static part is a number and whose activations are
linear in the tokens and pairs of the microbatches in flight, so that a planner evaluates thousands of microbatches at
once.

Assumptions: what the allocator loses to fragmentation, CUDA's context (0.5 to 1 GiB) and NCCL's buffers are not
included; leave a reserve. Layers of one module are alike (a mixture of kinds is their mean, and so are encoder layers
above the one that is read, which keep nothing). Under ZeRO-3 two layers are gathered at a time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from hf_dflop.cost.activations import PartMemory, activation_memory, dtype_bytes
from hf_dflop.cost.flops import Trainable, encoder_counts
from hf_dflop.cost.parameters import parameter_counts
from hf_dflop.cost.parts import MODULE_OF_PART, PARTS, PartState, part_states
from hf_dflop.cost.spec import ModelSpec
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = [
    "OPTIMIZERS",
    "MemorySettings",
    "MicrobatchCounts",
    "StageLayers",
    "StageMemory",
    "stage_memory",
]

OPTIMIZERS = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}
"""Numbers that each optimizer keeps per trained parameter."""


class MeasuredMemory(Protocol):
    """What `stage_memory` asks of a `ModelProfile`; None where it was not measured."""

    def part_memory(
        self, part: str, *, state: PartState, checkpointing: bool, tp: int, dtype: str
    ) -> PartMemory | None: ...

    def parameters(self, part: str, *, tp: int) -> int | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """How a model is trained, as far as memory goes. The default is pure bf16 with fp32 master weights and AdamW.

    `Trainer(bf16=True)` on fp32 weights is `dtype="bfloat16", weights_dtype="float32", gradients_dtype="float32",
    master_weights=False`; FSDP mixed precision the same, sharded.

    Raises:
        ModelError: an unknown dtype or optimizer, or a shard degree below 1.
    """

    dtype: str = "bfloat16"
    """Of activations."""
    weights_dtype: str | None = None
    """Of parameters; `dtype` if not given."""
    gradients_dtype: str | None = None
    """Of gradients; that of the weights if not given."""
    optimizer: str = "adamw"
    """One of `OPTIMIZERS`."""
    state_dtype: str = "float32"
    """Of the optimizer's state and of master weights."""
    master_weights: bool | None = None
    """A copy of the weights in `state_dtype`; by default where the weights have fewer bits."""
    trainable: Trainable = field(default_factory=Trainable)
    vision_checkpointing: bool = False
    llm_checkpointing: bool = False
    dense_attention: bool = False
    """Attention keeps its scores (eager); SDPA and flash attention do not."""
    zero_stage: int = 0
    """What is sharded over `shards` ranks: 0 nothing, 1 optimizer, 2 + gradients, 3 + parameters (FSDP)."""
    shards: int = 1

    def __post_init__(self) -> None:
        for name in (self.dtype, self.weights, self.gradients, self.state_dtype):
            dtype_bytes(name)
        if self.optimizer not in OPTIMIZERS:
            raise ModelError(f"optimizer is {self.optimizer!r}; use one of {', '.join(OPTIMIZERS)}.")
        if self.zero_stage not in (0, 1, 2, 3) or self.shards < 1:
            raise ModelError(
                f"zero_stage={self.zero_stage}, shards={self.shards}: the stage is 0 to 3, shards at least 1."
            )

    @property
    def weights(self) -> str:
        return self.weights_dtype or self.dtype

    @property
    def gradients(self) -> str:
        return self.gradients_dtype or self.weights

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state and master weight per trained parameter."""
        size = dtype_bytes(self.state_dtype)
        master = self.master_weights
        if master is None:
            master = dtype_bytes(self.weights) < size and self.optimizer != "sgd"
        return size * (OPTIMIZERS[self.optimizer] + int(master))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLayers:
    """Which parts of the model one rank holds (all of a replica without pipeline: `StageLayers.whole(spec)`)."""

    vision_layers: int = 0
    vision_fixed: bool = False
    """Patch embedding: with the encoder's first stage."""
    connector: bool = False
    llm_layers: int = 0
    llm_fixed: bool = False
    """Token embeddings: with the LLM's first stage."""
    llm_head: bool = False
    """LM head and loss: with the LLM's last stage."""

    def __post_init__(self) -> None:
        if self.vision_layers < 0 or self.llm_layers < 0:
            raise ModelError(f"a stage holds {self.vision_layers} and {self.llm_layers} layers; they must be >= 0.")

    @classmethod
    def whole(cls, spec: ModelSpec) -> "StageLayers":
        """The whole model."""
        return cls(
            vision_layers=spec.vision.num_layers,
            vision_fixed=True,
            connector=True,
            llm_layers=spec.llm.num_layers,
            llm_fixed=True,
            llm_head=True,
        )

    @property
    def copies(self) -> dict[str, int]:
        """How many of each of `PARTS` the rank holds."""
        return {
            "vision_fixed": int(self.vision_fixed),
            "vision_layer": self.vision_layers,
            "connector": int(self.connector),
            "llm_fixed": int(self.llm_fixed),
            "llm_layer": self.llm_layers,
            "llm_head": int(self.llm_head),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrobatchCounts:
    """What a microbatch makes a rank compute; numbers, or arrays `(num_microbatches,)` of them."""

    vision_tokens: Any = 0
    """Encoder positions: patches and class tokens of all tiles."""
    vision_pairs: Any = 0
    """Sum over the tiles of their positions squared."""
    llm_tokens: Any = 0
    """LLM positions, padding included."""
    llm_pairs: Any = 0
    """Sum over the rows of their positions squared (packed: over the samples, or the whole row squared for dense
    attention)."""

    @classmethod
    def of(cls, spec: ModelSpec, shapes: Shapes, groups: Iterable[Any], *, padded: bool) -> "MicrobatchCounts":
        """Counts of microbatches: arrays `(num_groups,)`.

        Args:
            spec (`ModelSpec`): the model; its class tokens count.
            shapes (`Shapes`): samples.
            groups: for each microbatch, the indices of its samples.
            padded (`bool`): rows are padded to the longest, or packed without padding (attention within samples).
        """
        columns = np.stack([*encoder_counts(spec, shapes), shapes.llm_tokens, shapes.llm_tokens**2]).astype(np.float64)
        counts = []
        for group in groups:
            picked = columns[:, np.asarray(group, dtype=np.int64)]
            sums = picked.sum(axis=1)
            if padded and picked.shape[1]:
                sums[2:] = picked.shape[1] * picked[2:].max(axis=1)
            counts.append(sums)
        table = np.asarray(counts).reshape(-1, 4)
        return cls(vision_tokens=table[:, 0], vision_pairs=table[:, 1], llm_tokens=table[:, 2], llm_pairs=table[:, 3])


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes of one rank: `static_bytes`, and activations by tokens and pairs of each module."""

    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    gathered_bytes: float
    """Parameters of two layers, gathered from all shards (ZeRO-3, FSDP)."""
    vision: PartMemory
    """Activations per encoder token and pair, of all parts of encoder and connector that the rank holds."""
    llm: PartMemory
    """Activations per LLM token and pair, logits included."""
    measured: bool
    """All coefficients come from a `ModelProfile`; otherwise some are from formulas."""

    @property
    def static_bytes(self) -> float:
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.gathered_bytes

    def kept_bytes(self, counts: MicrobatchCounts) -> Any:
        """Bytes that microbatches keep from forward to backward, elementwise."""
        return (
            self.vision.kept_per_token_bytes * counts.vision_tokens
            + self.vision.kept_per_pair_bytes * counts.vision_pairs
            + self.llm.kept_per_token_bytes * counts.llm_tokens
            + self.llm.kept_per_pair_bytes * counts.llm_pairs
        )

    def put_off_bytes(self, counts: MicrobatchCounts) -> Any:
        """Bytes that microbatches hold beside between the two parts of a split backward, elementwise."""
        return (
            self.vision.put_off_per_token_bytes * counts.vision_tokens
            + self.llm.put_off_per_token_bytes * counts.llm_tokens
        )

    def extra_bytes(self, counts: MicrobatchCounts) -> Any:
        """Bytes needed beside what is kept while a microbatch computes, elementwise; encoder and LLM do not compute
        at the same time."""
        return np.maximum(
            self.vision.extra_per_token_bytes * counts.vision_tokens
            + self.vision.extra_per_pair_bytes * counts.vision_pairs,
            self.llm.extra_per_token_bytes * counts.llm_tokens + self.llm.extra_per_pair_bytes * counts.llm_pairs,
        )

    def peak_bytes(self, in_flight: MicrobatchCounts) -> float:
        """Bytes with these microbatches in flight (forward done, backward not), one of them computing."""
        kept, extra = np.asarray(self.kept_bytes(in_flight)), np.asarray(self.extra_bytes(in_flight))
        return float(self.static_bytes + kept.sum() + (extra.max() if extra.size else 0.0))


def _settings_of(part: str, settings: MemorySettings) -> bool:
    """Whether the part is one whose activations are recomputed."""
    if part == "vision_layer":
        return settings.vision_checkpointing
    return part == "llm_layer" and settings.llm_checkpointing


def _sum(parts: Iterable[tuple[int, PartMemory]]) -> PartMemory:
    """What is kept adds up; what a backward needs beside it is that of the neediest part."""
    held = [(copies, part) for copies, part in parts if copies]
    return PartMemory(
        kept_per_token_bytes=sum(copies * part.kept_per_token_bytes for copies, part in held),
        kept_per_pair_bytes=sum(copies * part.kept_per_pair_bytes for copies, part in held),
        extra_per_token_bytes=max((part.extra_per_token_bytes for _, part in held), default=0.0),
        extra_per_pair_bytes=max((part.extra_per_pair_bytes for _, part in held), default=0.0),
        put_off_per_token_bytes=sum(copies * part.put_off_per_token_bytes for copies, part in held),
    )


def _activations(
    spec: ModelSpec, settings: MemorySettings, tp: Mapping[str, int], profile: MeasuredMemory | None
) -> tuple[dict[str, PartMemory], set[str]]:
    """Activation bytes of each part, and the parts that were measured."""
    train = settings.trainable
    states = part_states(train, checkpointing=settings.vision_checkpointing or settings.llm_checkpointing)
    found: dict[str, PartMemory] = {}
    measured = set()
    for part in PARTS:
        again = _settings_of(part, settings)
        degree = tp["vision" if part.startswith("vision") else "llm"] if part != "connector" else 1
        known = (
            None
            if profile is None
            else profile.part_memory(part, state=states[part], checkpointing=again, tp=degree, dtype=settings.dtype)
        )
        if known is not None:
            measured.add(part)
        made = activation_memory(
            spec,
            states,
            dtype=settings.dtype,
            checkpointing=again,
            dense_attention=settings.dense_attention,
            tp=degree,
        )[part]
        # A backward is split by pipelines alone, and never measured.
        found[part] = made if known is None else replace(known, put_off_per_token_bytes=made.put_off_per_token_bytes)
    read = 1.0 - spec.unread_vision_layers / spec.vision.num_layers
    layer = found["vision_layer"]
    found["vision_layer"] = replace(
        layer,
        kept_per_token_bytes=read * layer.kept_per_token_bytes,
        kept_per_pair_bytes=read * layer.kept_per_pair_bytes,
    )
    return found, measured


def stage_memory(
    spec: ModelSpec,
    layers: StageLayers,
    settings: MemorySettings,
    *,
    vision_tp: int = 1,
    llm_tp: int = 1,
    profile: MeasuredMemory | None = None,
) -> StageMemory:
    """Bytes of a rank that holds `layers`.

    Args:
        spec (`ModelSpec`): the model.
        layers (`StageLayers`): what of it the rank holds.
        settings (`MemorySettings`): formats, optimizer, recomputation, sharding, what is trained.
        vision_tp, llm_tp (`int`, default to 1): tensor-parallel degrees; the bytes are those of one shard.
        profile (`ModelProfile`, *optional*): measured coefficients, used where it has them.

    Returns:
        `StageMemory`: `peak_bytes(counts)` gives bytes for microbatches in flight.

    Example:
        >>> from hf_dflop.cost import ConnectorSpec, ModelSpec, TransformerSpec
        >>> size = dict(hidden=4, num_layers=1, heads=2, kv_heads=2, head_dim=2, intermediate=8, gated_mlp=False)
        >>> spec = ModelSpec(vision=TransformerSpec(**size), connector=ConnectorSpec(merge=1, linears=((4, 4),)),
        ...                  llm=TransformerSpec(**size, vocab=20), patch_size=2)
        >>> memory = stage_memory(spec, StageLayers(llm_layers=2), MemorySettings(dtype="float32"))
        >>> memory.parameters_bytes, memory.optimizer_bytes  # 2 layers of 136 parameters; two fp32 moments each
        (1088.0, 2176.0)
    """
    tp = {"vision": vision_tp, "llm": llm_tp}
    sharded = {name: settings.shards if settings.zero_stage >= stage else 1 for name, stage in _SHARDED.items()}
    states = part_states(settings.trainable)
    counted = {module: parameter_counts(spec, tp=degree) for module, degree in tp.items()}
    copies = layers.copies
    held: dict[str, float] = {}
    for part in PARTS:
        module = "vision" if part.startswith("vision") else "llm"
        degree = 1 if part == "connector" else tp[module]
        known = None if profile is None else profile.parameters(part, tp=degree)
        held[part] = float((known if known is not None else counted[module][part]) * copies[part])
    if spec.llm.tied_embeddings and copies["llm_fixed"] and copies["llm_head"]:
        held["llm_head"] = 0.0
    total = sum(held.values())
    trained = sum(count for part, count in held.items() if states[part] == "trained")
    largest = max((held[part] / copies[part] for part in PARTS if copies[part]), default=0.0)
    weight = dtype_bytes(settings.weights)
    parts, measured = _activations(spec, settings, tp, profile)
    vision = [part for part in PARTS if MODULE_OF_PART[part] != "llm"]
    return StageMemory(
        parameters_bytes=total * weight / sharded["parameters"],
        gradients_bytes=trained * dtype_bytes(settings.gradients) / sharded["gradients"],
        optimizer_bytes=trained * settings.state_bytes / sharded["optimizer"],
        gathered_bytes=2 * largest * dtype_bytes(settings.dtype) if sharded["parameters"] > 1 else 0.0,
        vision=_sum((copies[part], parts[part]) for part in vision),
        llm=_sum((copies[part], parts[part]) for part in PARTS if part not in vision),
        measured=all(part in measured for part in PARTS if copies[part]),
    )


_SHARDED = {"optimizer": 1, "gradients": 2, "parameters": 3}
"""ZeRO stage from which each is sharded."""
