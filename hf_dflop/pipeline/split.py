"""A model → the modules of its stages.

    stage 0            the model without decoder and head; runs `get_image_features`
    first LLM stage    the model without encoder; embeds tokens, puts the features in, runs its layers
    middle LLM stage   the received hidden states stand in for the embedding
    last LLM stage     its layers, the norm, the head and the loss of the model's own code

So the model's own code builds masks, positions and the loss on every stage, from the same `input_ids`; layers of
other stages hand hidden states on. No family is known by name.

In: a model, its structure, a plan. Out: one `VisionPart` or `LlmPart` per stage, and the names that a rank can drop.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import PlanError
from hf_dflop.pipeline.features import FeatureFormat, flatten, unflatten
from hf_dflop.pipeline.shell import Foreign, Inject, Received, shell
from hf_dflop.pipeline.structure import Structure, is_pixels
from hf_dflop.plan.plan import Plan

__all__ = ["LlmPart", "VisionPart", "build_part", "check_layers", "foreign_names", "layer_ranges"]


class VisionPart(nn.Module):
    """Stage 0: the encoder with its connector."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        super().__init__()
        frame = [structure.decoder, *structure.head]
        self.model = shell(model, {name: Foreign() for name in frame}, ("",))
        self.keys = structure.vision_keys
        self.body = structure.body

    def encode(self, inputs: Mapping[str, Any]) -> Any:
        """What the model's own `get_image_features` returns."""
        known = {key: value for key, value in inputs.items() if key in self.keys}
        return self.model.get_submodule(self.body).get_image_features(**known, return_dict=True)

    def forward(self, inputs: Mapping[str, Any], form: FeatureFormat) -> torch.Tensor:
        """Features `(rows, form.sent_width)`."""
        return flatten(self.encode(inputs), form)


class LlmPart(nn.Module):
    """One stage of the LLM."""

    def __init__(self, model: nn.Module, structure: Structure, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.received = Received()
        stands: dict[str, nn.Module] = {name: Foreign() for name in structure.encoder}
        originals = model.get_submodule(structure.layers)
        for index, original in enumerate(originals.children()):
            if index not in layers:
                stand = Foreign(original) if index or first else Inject(original, self.received)
                stands[f"{structure.layers}.{index}"] = stand
        if not first:
            stands |= {name: Foreign() for name in structure.before}
            stands[structure.embedding] = self.received
        if not last:
            stands |= {name: Foreign() for name in (*structure.after, *structure.head)}
        self.model = shell(model, stands, between(structure))
        self.body = structure.body

    def forward(
        self,
        inputs: Mapping[str, Any],
        received: torch.Tensor | None,
        form: FeatureFormat | None,
        loss_divisor: torch.Tensor | None,
    ) -> Any:
        """Hidden states `(rows, length, hidden)`; on the last stage the model's own output, with `loss`.

        Args:
            inputs (`Mapping`): text inputs of the model, the same on all stages; `labels` on the last.
            received (`torch.Tensor`, *optional*): features on the first stage, hidden states on the others.
            form (`FeatureFormat`, *optional*): format of the features.
            loss_divisor (`torch.Tensor`, *optional*): label tokens of the optimizer step, on the last stage.
        """
        # A cache is of no use here, and it would turn the detection of joined samples off.
        given = {"use_cache": False} | {key: value for key, value in inputs.items() if not is_pixels(key)}
        if self.first:
            if received is not None and form is not None:
                given["mm_encoder_outputs"] = {"image": unflatten(received, form)}
        else:
            self.received.value = received
        try:
            if self.last:
                return self.model(**given, num_items_in_batch=loss_divisor, return_dict=True)
            given.pop("labels", None)
            return self.model.get_submodule(self.body)(**given, return_dict=True).last_hidden_state
        finally:
            self.received.value = None


def between(structure: Structure) -> tuple[str, ...]:
    """Modules whose own parameters (a newline embedding) belong to the encoder: the body, and on to the decoder."""
    names, at = [structure.body], structure.body
    for step in structure.decoder[len(structure.body) + 1 :].split(".")[:-1]:
        at = f"{at}.{step}"
        names.append(at)
    return tuple(names)


def layer_ranges(plan: Plan) -> tuple[range, ...]:
    """Layers of each LLM stage."""
    ranges, start = [], 0
    for count in plan.llm.layers:
        ranges.append(range(start, start + count))
        start += count
    return tuple(ranges)


def check_layers(plan: Plan, structure: Structure) -> None:
    """Raises `PlanError` if the plan's layers are not the model's."""
    if plan.llm.num_layers != structure.num_layers:
        raise PlanError(
            f"the plan spreads {plan.llm.num_layers} LLM layers over its stages; the model has {structure.num_layers}."
        )
    if plan.llm.layers[0] < 1:
        raise PlanError("the first LLM stage has no layer; give it at least one: llm.layers[0] >= 1.")


def build_part(model: nn.Module, structure: Structure, plan: Plan, stage: int) -> VisionPart | LlmPart:
    """The module of a stage (0 is the encoder's)."""
    if stage == 0:
        return VisionPart(model, structure)
    ranges = layer_ranges(plan)
    return LlmPart(model, structure, ranges[stage - 1], first=stage == 1, last=stage == len(ranges))


def foreign_names(structure: Structure, plan: Plan, stages: Collection[int]) -> tuple[list[str], list[str]]:
    """Modules that none of `stages` needs, and modules whose own parameters none of them needs."""
    ranges = layer_ranges(plan)
    kept = {index for stage in stages if stage for index in ranges[stage - 1]}
    names = [f"{structure.layers}.{index}" for index in range(structure.num_layers) if index not in kept]
    if 1 not in stages:
        names += dict.fromkeys((*structure.before, structure.embedding))
    if len(ranges) not in stages:
        names += [*structure.after, *structure.head]
    if 0 not in stages:
        names += structure.encoder
    return names, [] if 0 in stages else list(between(structure))


def owner_stage(structure: Structure, plan: Plan, name: str) -> int:
    """The stage that holds a parameter or buffer (the first, of a tied embedding)."""

    def inside(parts: Sequence[str]) -> bool:
        return any(name.startswith(part + ".") for part in parts)

    for stage, layers in enumerate(layer_ranges(plan), start=1):
        if inside([f"{structure.layers}.{index}" for index in layers]):
            return stage
    if inside((*structure.after, *structure.head)):
        return len(plan.llm.layers)
    if inside((structure.decoder,)):
        return 1
    return 0
