"""A model → the modules of its stages.

    encoder stages     the model without decoder and head; run `get_image_features`, see `encoder`
    first LLM stage    the model without encoder; embeds tokens, puts the features in, runs its layers
    middle LLM stage   the received hidden states stand in for the embedding
    last LLM stage     its layers, the norm, the head and the loss of the model's own code

So the model's own code builds masks, positions and the loss on every stage, from the same `input_ids`; layers of
other stages hand hidden states on. No family is known by name. Router logits for a balancing loss travel along, see
`router`.

In: a model, its structure, a plan. Out: one `VisionPart` or `LlmPart` per stage, and the names that a rank can drop.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline._compat import call_with_features
from hf_dflop.pipeline.encoder import VisionPart, read_stack, vision_ranges
from hf_dflop.pipeline.kinds import Formats, enter, is_pixels
from hf_dflop.pipeline.router import LayerRouters, join_logits, read_routers, split_logits
from hf_dflop.pipeline.shell import Foreign, Inject, Received, shell
from hf_dflop.pipeline.structure import Structure, read_structure
from hf_dflop.plan.plan import Plan

__all__ = [
    "LlmPart",
    "VisionPart",
    "build_part",
    "foreign_names",
    "layer_ranges",
    "owner_stage",
    "read_cut",
    "unread_names",
]


class LlmPart(nn.Module):
    """One stage of the LLM."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        layers: range,
        routers: LayerRouters,
        *,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.hidden_size = structure.hidden_size
        self.routed = any(routers)
        self.routers = tuple(router for layer in routers[: layers.start] for router in layer)
        self._logits: tuple[torch.Tensor, ...] = ()  # of earlier layers
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
        self.model = shell(model, stands, structure.between)
        self.body = structure.body
        if last and self.routers:
            body = self.model.get_submodule(self.body)
            body._forward_hooks = OrderedDict(body._forward_hooks)  # the copy's own, not those of other stages
            body.register_forward_hook(self._add_logits)

    def _add_logits(self, body: nn.Module, args: Any, output: Any) -> None:
        """Give the head the router logits of all layers: it computes the loss from what the body returned."""
        output.router_logits = (*self._logits, *output.router_logits)

    def forward(
        self,
        inputs: Mapping[str, Any],
        received: torch.Tensor | None,
        forms: Formats,
        loss_divisor: torch.Tensor | None,
    ) -> Any:
        """What is sent, `(rows, length, width)`: hidden states, and router logits beside them. On the last stage the
        model's own output, with `loss`.

        Args:
            inputs (`Mapping`): text inputs of the model, the same on all stages; `labels` on the last.
            received (`torch.Tensor`, *optional*): features on the first stage, hidden states on the others.
            forms (`Mapping`): kind -> format of the features; empty before any came.
            loss_divisor (`torch.Tensor`, *optional*): label tokens of the optimizer step, on the last stage.
        """
        body = self.model.get_submodule(self.body)
        # A cache is of no use here, and it would turn the detection of joined samples off.
        given = {"use_cache": False} | {key: value for key, value in inputs.items() if not is_pixels(key)}
        if self.first:
            if received is not None and forms:
                given["mm_encoder_outputs"] = enter(received, forms, body, inputs)
        else:
            assert received is not None
            self.received.value, self._logits = split_logits(received, self.hidden_size, self.routers)
        try:
            if self.last:
                result = call_with_features(
                    self.model, body, **given, num_items_in_batch=loss_divisor, return_dict=True
                )
                if not self.routed and getattr(result, "aux_loss", None) is not None:
                    raise ModelError(
                        "output_router_logits was asked for after the model was cut, and the balancing loss lacks "
                        "the layers of other stages: set it in the model's text config before."
                    )
                return result
            given.pop("labels", None)
            if self.routed:
                given["output_router_logits"] = True
            output = call_with_features(body, body, **given, return_dict=True)
            own = output.router_logits if self.routed else ()
            return join_logits(output.last_hidden_state, self._logits, own)
        finally:
            self.received.value, self._logits = None, ()


def layer_ranges(plan: Plan) -> tuple[range, ...]:
    """Layers of each LLM stage."""
    ranges, start = [], 0
    for count in plan.llm.layers:
        ranges.append(range(start, start + count))
        start += count
    return tuple(ranges)


def read_cut(model: nn.Module, plan: Plan) -> Structure:
    """The parts of `model` that the plan cuts.

    Raises:
        ModelError: it cannot be cut so.
        PlanError: the plan's layers are not the model's.
    """
    structure = read_structure(model)
    if plan.llm.num_layers != structure.num_layers:
        raise PlanError(
            f"the plan spreads {plan.llm.num_layers} LLM layers over its stages; the model has {structure.num_layers}."
        )
    if plan.llm.layers[0] < 1:
        raise PlanError("the first LLM stage has no layer; give it at least one: llm.layers[0] >= 1.")
    if plan.vision.num_stages == 1:
        return structure
    vision_ranges(plan.vision.layers)
    return replace(structure, stack=read_stack(model, structure, plan.vision.num_layers))


def build_part(
    model: nn.Module, structure: Structure, plan: Plan, stage: int, routers: LayerRouters | None = None
) -> VisionPart | LlmPart:
    """The module of a stage, of all stages of the model; `routers` where it runs under autocast."""
    encoders = plan.vision.num_stages
    if stage < encoders:
        return VisionPart(model, structure, None if encoders == 1 else vision_ranges(plan.vision.layers)[stage])
    ranges, at = layer_ranges(plan), stage - encoders
    routers = read_routers(model, structure) if routers is None else routers
    return LlmPart(model, structure, ranges[at], routers, first=at == 0, last=at == len(ranges) - 1)


def foreign_names(structure: Structure, plan: Plan, stages: Collection[int]) -> tuple[list[str], list[str]]:
    """Modules that none of `stages` needs, and modules whose own parameters none of them needs."""
    ranges, encoders = layer_ranges(plan), plan.vision.num_stages
    kept = {index for stage in stages if stage >= encoders for index in ranges[stage - encoders]}
    names = [f"{structure.layers}.{index}" for index in range(structure.num_layers) if index not in kept]
    bare = [] if encoders - 1 in stages else list(structure.between)
    if encoders not in stages:
        names += dict.fromkeys((*structure.before, structure.embedding))
    if encoders + len(ranges) - 1 not in stages:
        names += [*structure.after, *structure.head]
    if not any(stage < encoders for stage in stages):
        names += structure.encoder
    elif structure.stack is not None:
        stack, layers = structure.stack, vision_ranges(plan.vision.layers)
        own = {index for stage in stages if stage < encoders for index in layers[stage]}
        names += [f"{stack.layers}.{index}" for index in range(stack.num_layers) if index not in own]
        if 0 not in stages:
            names += stack.before
            bare += stack.frames
        if encoders - 1 not in stages:
            names += stack.after
    return names, bare


def unread_names(structure: Structure, plan: Plan, stages: Collection[int]) -> tuple[list[str], list[str]]:
    """Of `foreign_names`, those whose values `stages` do not need either: a later encoder stage runs what precedes
    the layers."""
    names, bare = foreign_names(structure, plan, stages)
    run: set[str] = set()
    if structure.stack is not None and any(stage < plan.vision.num_stages for stage in stages):
        run = {*structure.stack.before, *structure.stack.frames}
    return [name for name in names if name not in run], [name for name in bare if name not in run]


def owner_stage(structure: Structure, plan: Plan, name: str) -> int:
    """The stage that holds a parameter or buffer (the first, of a tied embedding)."""

    def inside(parts: Sequence[str]) -> bool:
        return any(name.startswith(part + ".") for part in parts)

    encoders = plan.vision.num_stages
    for stage, layers in enumerate(layer_ranges(plan), start=encoders):
        if inside([f"{structure.layers}.{index}" for index in layers]):
            return stage
    if inside((*structure.after, *structure.head)):
        return encoders + len(plan.llm.layers) - 1
    if inside((structure.decoder,)):
        return encoders
    if structure.stack is None:
        return 0
    for stage, layers in enumerate(vision_ranges(plan.vision.layers)):
        if inside([f"{structure.stack.layers}.{index}" for index in layers]):
            return stage
    precedes = inside(structure.stack.before) or name.rpartition(".")[0] in structure.stack.frames
    return 0 if precedes else encoders - 1
