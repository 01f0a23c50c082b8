"""What goes into a call on one rank and what comes out: text where the LLM runs, pixels where the encoder runs, labels
at the end.

In: the step's shapes, a way to collate any of its samples. Out: a `StepBatch`. A rank asks only for the samples that
it works on, so encoder ranks never build text of others, and LLM ranks never keep pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_dflop.pipeline.bridge import route_step
from hf_dflop.pipeline.kinds import is_pixels, kinds_of
from hf_dflop.pipeline.shape import StepShape
from hf_dflop.pipeline.topology import Topology

__all__ = ["Sample", "StepBatch", "StepResult", "build_batch"]

Sample = tuple[int, int, int]
"""Microbatch, LLM replica, place in that microbatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What `PipelineModel.step` takes. Lists have one entry per microbatch, `None` where the rank has no work."""

    shape: StepShape
    text: tuple[Mapping[str, Any] | None, ...] = ()
    """Text inputs of this rank's LLM replica (`input_ids`, ..., `labels`); empty on encoder ranks."""
    vision: tuple[Mapping[str, Any] | None, ...] = ()
    """Inputs of `get_image_features` and `get_video_features` of this rank's encoder replica, and `input_ids` where a
    microbatch has images and videos; empty on LLM ranks."""
    samples: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Dataset indices: microbatch -> LLM replica -> its samples. For the trace alone; empty where not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a call gives, on every rank."""

    loss: float
    """Sum of token losses of the call ÷ label tokens of the optimizer step."""
    label_tokens: int
    """Label tokens of the call, counted in the labels themselves."""
    logits: dict[int, torch.Tensor]
    """Microbatch -> logits of this replica, on ranks of the last stage, if they were asked for."""
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    """Microbatch -> this replica's share of `loss`, on ranks of the last stage."""


def build_batch(
    shape: StepShape,
    topology: Topology,
    rank: int,
    collate_text: Callable[[Sequence[Sample]], Mapping[str, Any]],
    collate_vision: Callable[[Sequence[Sample]], Mapping[str, Any]] | None = None,
) -> StepBatch:
    """The inputs of a rank.

    Args:
        shape (`StepShape`): shapes of the call.
        topology (`Topology`), rank (`int`): the plan's ranks, and which of them.
        collate_text (`Callable`):
            Samples -> the model's inputs. Pixels in it are dropped; give a collator that does not decode them.
        collate_vision (`Callable`, *optional*):
            Samples -> inputs of the encoder; `collate_text` by default. Labels in it are dropped, and ids unless there
            are images and videos.
    """
    place = topology.place(rank)
    text: list[Mapping[str, Any] | None] = []
    vision: list[Mapping[str, Any] | None] = []
    routes = route_step(shape, topology.replicas(0), colocated=not topology.disjoint)
    for m, (replicas, route) in enumerate(zip(shape.microbatches, routes, strict=True)):
        if place.is_llm:
            samples = [(m, place.replica, i) for i in range(len(replicas[place.replica].features))]
            inputs = collate_text(samples) if samples else None
            if inputs is not None:
                drop_labels = topology.last_stage not in place.stages
                inputs = {
                    key: value
                    for key, value in inputs.items()
                    if not is_pixels(key) and not (drop_labels and key == "labels")
                }
            text.append(inputs)
        if place.encodes:
            samples = [(m, d, i) for d, i in route.samples[place.replica]]
            found = (collate_vision or collate_text)(samples) if samples else None
            if found is not None:
                dropped = ("labels",) if len(kinds_of(found)) > 1 else ("input_ids", "labels")
                found = {key: value for key, value in found.items() if key not in dropped}
            vision.append(found)
    return StepBatch(shape=shape, text=tuple(text), vision=tuple(vision))
