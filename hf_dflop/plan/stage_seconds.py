"""Seconds of a microbatch on each stage: what a cost model says of modules, cut by a plan into stages.

In: a plan, a cost model, shapes, the samples of each microbatch. Out: forward and backward seconds of each stage,
replica and microbatch.

The encoder's replicas share the images of a microbatch as the pipeline does it: whole samples, in the order of the
LLM's replicas, cut into contiguous runs as even in image tokens as whole samples allow (`share_images`).

Assumptions: a stage's seconds go with its number of layers; the LM head is the last stage's, the connector is spread
over the encoder's; embeddings take no time. Tensor parallelism divides seconds by its degree, its collectives come on
top.
`per_microbatch_s` of the cost model is spread over the stages by their seconds, where a stage has work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import CostModel, Trainable
from hf_dflop.cost.flops import encoder_counts, llm_terms, vision_terms
from hf_dflop.cost.from_profile import DIRECTIONS
from hf_dflop.errors import PlanError
from hf_dflop.plan.padded_heads import encoder_share
from hf_dflop.plan.plan import Plan
from hf_dflop.shapes import Shapes

__all__ = [
    "SampleSeconds",
    "StageSeconds",
    "sample_seconds",
    "share_images",
    "share_places",
    "stage_seconds",
    "stock_flat",
]

FloatArray = npt.NDArray[np.float64]
Groups = Sequence[Sequence[Any]]
"""LLM replica -> microbatch -> samples."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleSeconds:
    """Seconds of each sample alone on one GPU, `(num_samples,)` each: forward, and backward with recomputation. With
    the heads that the plan's tensor parallelism adds to the encoder."""

    vision_forward: FloatArray
    vision_backward: FloatArray
    llm_forward: FloatArray
    """Layers of the LLM, without its head."""
    llm_backward: FloatArray
    head_forward: FloatArray
    head_backward: FloatArray
    overhead_s: float
    """Of every microbatch."""

    def select(self, samples: npt.NDArray[np.int64]) -> "SampleSeconds":
        """Those of some samples."""
        rows = (field.name for field in fields(self) if field.name != "overhead_s")
        return replace(self, **{name: getattr(self, name)[samples] for name in rows})

    @property
    def vision(self) -> FloatArray:
        return self.vision_forward + self.vision_backward

    @property
    def llm(self) -> FloatArray:
        return self.llm_forward + self.llm_backward + self.head_forward + self.head_backward


def sample_seconds(plan: Plan, cost: CostModel, shapes: Shapes) -> SampleSeconds:
    """Seconds of each sample under a plan: what is frozen, checkpointed or cached is the plan's.

    Args:
        plan (`Plan`), cost (`CostModel`), shapes (`Shapes`): of one model.

    Raises:
        PlanError: the plan has other layers than the cost model's spec.
    """
    spec = cost.spec
    for name, planned, found in (
        ("vision", plan.vision.num_layers, spec.vision.num_layers),
        ("llm", plan.llm.num_layers, spec.llm.num_layers),
    ):
        if planned != found:
            raise PlanError(
                f"the plan places {planned} {name} layers, the model of the costs has {found}: they are of different "
                "models. Plan again for this model, or pass its profile."
            )
    frozen = set(plan.frozen)
    trainable = replace(
        cost.trainable,
        vision="vision" not in frozen,
        connector="connector" not in frozen,
        llm="llm" not in frozen and not cost.trainable.llm_adapters,
    )
    vision_forward, vision_s = _vision(
        replace(cost, trainable=trainable, checkpointing=plan.vision.checkpointing), shapes
    )
    padding = encoder_share(spec, plan.vision.tp) * plan.vision.tp
    vision_forward, vision_s = padding * vision_forward, padding * vision_s
    if plan.cached_features:
        vision_forward = vision_s = np.zeros(len(shapes))
    llm = replace(cost, trainable=trainable, checkpointing=plan.llm.checkpointing)
    if cost.profile is not None:
        lengths = shapes.llm_tokens.astype(np.float64)
        ways = {
            (module, way): llm.measured_s(module, way, lengths, lengths**2)
            for module in ("llm", "llm_head")
            for way in DIRECTIONS
        }
        return SampleSeconds(
            vision_forward=vision_forward,
            vision_backward=vision_s - vision_forward,
            llm_forward=ways["llm", "forward"],
            llm_backward=ways["llm", "backward"],
            head_forward=ways["llm_head", "forward"],
            head_backward=ways["llm_head", "backward"],
            overhead_s=cost.per_microbatch_s,
        )
    terms = llm_terms(spec, shapes.llm_tokens, causal_factor=cost.causal_factor)
    head_forward = terms["llm_head"] / cost.rates.llm_linear
    forward = terms["llm_linear"] / cost.rates.llm_linear + terms["llm_attention"] / cost.rates.llm_attention
    backward = np.maximum(llm.llm_s(shapes) - forward - head_forward, 0.0)
    head_backward = np.minimum(head_forward * (2.0 if trainable.llm else 1.0), backward)
    return SampleSeconds(
        vision_forward=vision_forward,
        vision_backward=np.maximum(vision_s - vision_forward, 0.0),
        llm_forward=forward,
        llm_backward=backward - head_backward,
        head_forward=head_forward,
        head_backward=head_backward,
        overhead_s=cost.per_microbatch_s,
    )


def _vision(cost: CostModel, shapes: Shapes) -> tuple[FloatArray, FloatArray]:
    if cost.profile is not None:
        return cost.measured_s("vision", "forward", *encoder_counts(cost.spec, shapes)), cost.vision_s(shapes)
    terms = dict(vision_terms(cost.spec, shapes))
    attention = terms.pop("vision_attention") / cost.rates.vision_attention
    forward = np.sum(list(terms.values()), axis=0) / cost.rates.vision_linear + attention
    return forward, cost.vision_s(shapes)


def first_backward_stage(plan: Plan, trainable: Trainable | None = None) -> int:
    """Stages before it have no backward: an encoder that nothing is trained in."""
    frozen = set(plan.frozen)
    return plan.vision.num_stages if {"vision", "connector"} <= frozen or plan.cached_features else 0


def stock_flat(num_samples: int, num_groups: int) -> npt.NDArray[np.int64]:
    """Group of each sample, slot × ranks + rank, as accelerate deals them: runs of the sampler's order, round the
    ranks."""
    each, more = divmod(num_samples, num_groups)
    sizes = np.full(num_groups, each)
    sizes[:more] += 1
    return np.repeat(np.arange(num_groups), sizes)


def share_images(shapes: Shapes, groups: Groups, num_encoders: int, *, own: bool) -> tuple[Any, Any, Any]:
    """Which encoder replica encodes which samples of each microbatch.

    Args:
        shapes (`Shapes`), groups: samples, and replica -> microbatch -> samples.
        num_encoders (`int`): replicas of the encoder.
        own (`bool`): encoder replica d encodes for LLM replica d alone (encoder on the LLM's ranks).

    Returns:
        `(owner, forward_from, backward_from)`: `(num_samples,)` encoder replica of each sample (-1: no image), and the
        ranges of replicas that `Durations` takes.
    """
    num_llm, num_microbatches = len(groups), len(groups[0])
    parts = [np.asarray(groups[d][m], dtype=np.int64) for m in range(num_microbatches) for d in range(num_llm)]
    place = np.repeat(np.arange(len(parts)), [part.size for part in parts])
    return share_places(shapes, np.concatenate(parts), place, num_llm, num_microbatches, num_encoders, own=own)


def share_places(
    shapes: Shapes,
    samples: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
    num_llm: int,
    num_microbatches: int,
    num_encoders: int,
    *,
    own: bool,
) -> tuple[Any, Any, Any]:
    """`share_images` of samples in a row: `place` is microbatch × num_llm + replica of each, ascending."""
    owner = np.full(len(shapes), -1, dtype=np.int64)
    has_image = shapes.image_tokens[samples] > 0
    samples, place = samples[has_image], place[has_image]
    microbatch, replica = place // num_llm, place % num_llm
    if own:
        part = replica
    else:  # the part in whose even share of the microbatch's rows a sample's middle lies
        rows = shapes.image_tokens[samples]
        total = np.bincount(microbatch, rows, num_microbatches).astype(np.int64)
        before = np.concatenate([[0], np.cumsum(total)[:-1]])
        middle = 2 * (np.cumsum(rows) - rows - before[microbatch]) + rows
        part = np.minimum(num_encoders - 1, middle * num_encoders // (2 * total[microbatch]))
    owner[samples] = part
    forward = _ranges(replica, microbatch, part, (num_llm, num_microbatches))
    backward = _ranges(part, microbatch, replica, (num_encoders, num_microbatches))
    return owner, forward, backward


def _ranges(of: Any, microbatch: Any, by: Any, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """First and last + 1 of `by` for each (`of`, microbatch): `(*shape, 2)`; 0, 0 where there is none. Within a
    microbatch `of` and `by` ascend."""
    found = np.zeros((*shape, 2), dtype=np.int64)
    if of.size:
        new = np.flatnonzero((np.diff(of) != 0) | (np.diff(microbatch) != 0)) + 1
        first, last = np.concatenate([[0], new]), np.concatenate([new - 1, [of.size - 1]])
        found[of[first], microbatch[first], 0] = by[first]
        found[of[first], microbatch[first], 1] = by[last] + 1
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageSeconds:
    """Forward and backward of each stage: `(num_replicas, num_microbatches)` seconds."""

    forward: list[FloatArray]
    backward: list[FloatArray]
    image_tokens: FloatArray
    """`(num_llm_replicas, num_microbatches)`."""
    llm_tokens: FloatArray
    """The same, with padding."""
    forward_from: Any
    backward_from: Any


def stage_seconds(plan: Plan, seconds: SampleSeconds, shapes: Shapes, groups: Groups) -> StageSeconds:
    """Seconds of the microbatches `groups` on each stage of the plan."""
    num_llm, num_microbatches = plan.llm.dp, plan.num_microbatches
    owner, forward_from, backward_from = share_images(shapes, groups, plan.vision.dp, own=plan.placement != "disjoint")
    vision = np.zeros((2, plan.vision.dp, num_microbatches))
    layers = np.zeros((2, num_llm, num_microbatches))
    head = np.zeros((2, num_llm, num_microbatches))
    tokens = np.zeros((2, num_llm, num_microbatches))
    lengths = shapes.llm_tokens
    for d in range(num_llm):
        for m in range(num_microbatches):
            group = np.asarray(groups[d][m], dtype=np.int64)
            if not group.size:
                continue
            for way, values in enumerate((seconds.vision_forward, seconds.vision_backward)):
                with_image = group[owner[group] >= 0]
                np.add.at(vision[way, :, m], owner[with_image], values[with_image])
            for table, columns in (
                (layers, (seconds.llm_forward, seconds.llm_backward)),
                (head, (seconds.head_forward, seconds.head_backward)),
            ):
                for way, values in enumerate(columns):
                    table[way, d, m] = _padded(values[group]) if plan.padded else values[group].sum()
            tokens[0, d, m] = shapes.image_tokens[group].sum()
            tokens[1, d, m] = _padded(lengths[group]) if plan.padded else lengths[group].sum()
    forward, backward = [], []
    for share in _shares(plan.vision.layers):
        forward.append(vision[0] * share / plan.vision.tp)
        backward.append(vision[1] * share / plan.vision.tp)
    for stage, share in enumerate(_shares(plan.llm.layers)):
        last = float(stage == plan.llm.num_stages - 1)
        forward.append((layers[0] * share + last * head[0]) / plan.llm.tp)
        backward.append((layers[1] * share + last * head[1]) / plan.llm.tp)
    if seconds.overhead_s:
        means = np.array([f.mean() + b.mean() for f, b in zip(forward, backward, strict=True)])
        total = means.sum()
        for stage, mean in enumerate(means):
            own = seconds.overhead_s * (mean / total if total > 0 else 1.0 / len(means))
            ahead = forward[stage].mean() / mean if mean > 0 else 1.0
            # a stage without work in a microbatch (an encoder without images) is not run there
            has_work = forward[stage] > 0
            forward[stage] = forward[stage] + own * ahead * has_work
            backward[stage] = backward[stage] + own * (1.0 - ahead) * has_work
    return StageSeconds(
        forward=forward,
        backward=backward,
        image_tokens=tokens[0],
        llm_tokens=tokens[1],
        forward_from=forward_from,
        backward_from=backward_from,
    )


def _padded(values: npt.NDArray[Any]) -> float:
    return float(values.size * values.max())


def _shares(layers: Sequence[int]) -> list[float]:
    return [count / sum(layers) for count in layers] if sum(layers) else [1.0] + [0.0] * (len(layers) - 1)
