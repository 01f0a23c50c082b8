"""The encoder's stages: where an encoder can be cut, and the modules of its stages.

    first stage    what precedes the layers (patches, positions), its layers
    middle stage   its layers
    last stage     its layers, what follows them, the connector, what `get_image_features` makes of it all

Every stage runs the model's own `get_image_features` and `get_video_features` on the same pixels, so masks, windows,
rotary tables and the choice of features are the model's. A stage before the last stops at the first layer that is not
its own, and sends what that layer would get, of images and of videos. On a later stage what was received stands in for
the output of the layer before its first; what precedes the layers is run there without gradients, for its shape and
for what else is computed from it, and its values are not used. Where modules after the layers take features at a depth
(deepstack), the hidden states of that depth travel on to the last stage, which has these modules.

In: a model, its structure, the layers of each stage. Out: an `EncoderStack`, and one `VisionPart` per stage.

Assumptions: the layers are one list that hands one tensor on, of the same shape between all of them; what else is
taken at a depth (recorded hidden states) comes from the last stage's layers or from what it received. The start-up
check tries it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline.kinds import Formats, join, kinds_of, run_encoder
from hf_dflop.pipeline.shell import Foreign, shell
from hf_dflop.pipeline.states import Shapes, pack, unpack

if TYPE_CHECKING:
    from hf_dflop.pipeline.structure import Structure

__all__ = ["EncoderStack", "VisionPart", "read_stack", "vision_ranges"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderStack:
    """Qualified names of the parts of an encoder that is a stack of layers."""

    layers: str
    num_layers: int
    frames: tuple[str, ...]
    """The tower and the modules between it and its layers; parameters of their own precede the layers."""
    before: tuple[str, ...]
    """Modules with parameters that run before the layers."""
    after: tuple[str, ...]
    """Modules with parameters that run after the layers: norms, mergers, the connector."""


def read_stack(model: nn.Module, structure: "Structure", num_layers: int) -> EncoderStack:
    """Where the encoder's layers stand.

    Raises:
        ModelError: the model does not tell its encoder, or it has not one list of that many layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if structure.tower is None:
        raise ModelError(
            f"{type(model).__name__} does not tell which module is its encoder (no get_encoder); run the encoder as "
            "one stage."
        )
    tower = model.get_submodule(structure.tower)
    lists = {
        name: child
        for name, child in tower.named_modules()
        if isinstance(child, nn.ModuleList) and next(child.parameters(), None) is not None
    }
    fitting = [name for name, child in lists.items() if len(child) == num_layers]
    fitting = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    if len(fitting) > 1:  # a list of mergers as long as that of the layers
        fitting = [name for name in fitting if isinstance(lists[name][0], GradientCheckpointingLayer)]
    if len(fitting) != 1:
        found = ", ".join(f"{name} of {len(child)}" for name, child in lists.items()) or "none"
        raise ModelError(
            f"the plan spreads {num_layers} encoder layers over its stages, and {type(tower).__name__} has "
            f"{len(fitting)} lists of as many modules (lists: {found}): give vision.layers as many layers as the "
            "encoder has, or run it as one stage."
        )
    root = next((name for name in structure.encoder if f"{structure.tower}.".startswith(f"{name}.")), structure.tower)
    frames: list[str] = []
    before: list[str] = []
    after: list[str] = []
    at = root
    for step in f"{structure.tower}.{fitting[0]}"[len(root) + 1 :].split("."):
        frames.append(at)
        children = list(model.get_submodule(at).named_children())
        place = [name for name, _ in children].index(step)
        for number, (name, child) in enumerate(children):
            if number != place and next(child.parameters(), None) is not None:
                (before if number < place else after).append(f"{at}.{name}")
        at = f"{at}.{step}"
    outside = [
        name
        for name in structure.encoder
        if name != root and next(model.get_submodule(name).parameters(), None) is not None
    ]
    return EncoderStack(
        layers=at, num_layers=num_layers, frames=tuple(frames), before=tuple(before), after=(*after, *outside)
    )


def vision_ranges(layers: tuple[int, ...]) -> tuple[range, ...]:
    """Layers of each encoder stage.

    Raises:
        PlanError: a stage has none.
    """
    if min(layers) < 1:
        raise PlanError(f"vision.layers is {layers}; every stage of a split encoder needs a layer.")
    ranges, start = [], 0
    for count in layers:
        ranges.append(range(start, start + count))
        start += count
    return tuple(ranges)


class _Reached(Exception):
    """The stage has come to its end; not an error."""


class _Relay:
    """What the stand-ins of a stage share with it."""

    def __init__(self) -> None:
        self.probing = False
        self.live = True  # the stage's own layers run, or have run
        self.received: torch.Tensor | None = None
        self.reached: torch.Tensor | None = None
        self.depths: list[torch.Tensor] = []  # hidden states at the depths where features were taken so far
        self.num_taken = 0


def _pass_on(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _inject(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if self.relay.probing:
        _stop(self, hidden_states)
    self.relay.live = True
    return hidden_states if self.relay.received is None else self.relay.received


def _stop(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    self.relay.reached = hidden_states
    raise _Reached


def _stand_in(original: nn.Module, forward: Any, relay: _Relay) -> nn.Module:
    """A layer without weights: of the original's class, so that what records the outputs of layers counts it."""
    kind = type(original)
    made: Any = object.__new__(type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__}))
    for name, value in vars(original).items():
        made.__dict__[name] = value.copy() if isinstance(value, dict) else value
    for registry in ("_parameters", "_buffers", "_modules"):
        made.__dict__[registry] = {}
    made.__dict__.pop("forward", None)
    made.__dict__["relay"] = relay
    made.__dict__["gradient_checkpointing"] = False
    return made


class _Shape(nn.Module):
    """Stands for a module before the layers, on a later stage: runs it, whose weights are another stage's to train."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not registered: no parameter of this stage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.__dict__["original"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__["original"]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class _Taken(nn.Module):
    """A module after the layers, which takes features at a depth: on the last stage, at what was received of it."""

    def __init__(self, original: nn.Module, relay: _Relay) -> None:
        super().__init__()
        self.original = original
        self.__dict__["relay"] = relay

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        relay = self.__dict__["relay"]
        if not relay.live:
            if relay.num_taken < len(relay.depths):
                hidden_states = relay.depths[relay.num_taken]
            relay.num_taken += 1
        return self.original(hidden_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class _Noted(Foreign):
    """Stands for such a module on the stages before: notes at which depths features are taken."""

    def __init__(self, relay: _Relay) -> None:
        super().__init__()
        self.__dict__["relay"] = relay

    def forward(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        relay = self.__dict__["relay"]
        if relay.live:
            relay.depths.append(hidden_states)
        relay.num_taken += 1
        return hidden_states

    def __getitem__(self, index: Any) -> "_Noted":
        return self


class VisionPart(nn.Module):
    """One stage of the encoder; `layers` is None where it is the only one."""

    def __init__(self, model: nn.Module, structure: "Structure", layers: range | None = None) -> None:
        super().__init__()
        stack = structure.stack
        self.relay = _Relay()
        self.first = self.last = True
        self._num_depths: dict[str, int] = {}  # by kind
        stands: dict[str, nn.Module] = {name: Foreign() for name in (structure.decoder, *structure.head)}
        bare = [""]
        if layers is not None:
            assert stack is not None
            self.first, self.last = layers.start == 0, layers.stop == stack.num_layers
            for index, original in enumerate(model.get_submodule(stack.layers).children()):
                if index not in layers:
                    forward = _stop if index >= layers.stop else _inject if index == layers.start - 1 else _pass_on
                    stands[f"{stack.layers}.{index}"] = _stand_in(original, forward, self.relay)
            if not self.first:
                stands |= {name: _Shape(model.get_submodule(name)) for name in stack.before}
            if not self.last:
                stands |= {name: _Noted(self.relay) for name in stack.after}
                bare += structure.between
            else:
                for name in stack.after:
                    module = model.get_submodule(name)
                    parts = module.named_children() if isinstance(module, nn.ModuleList) else ()
                    each = {f"{name}.{key}": part for key, part in parts} or {name: module}
                    stands |= {key: _Taken(part, self.relay) for key, part in each.items()}
        self.model = shell(model, stands, bare)
        if not self.first and stack is not None:
            for name in stack.frames:
                _keep_values(self.model.get_submodule(name))
        self.keys = structure.keys
        self.body = structure.body

    def encode(self, inputs: Mapping[str, Any], received: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """What the model's own methods return, by kind, where there are pixels for them.

        Args:
            inputs (`Mapping`): of the model's `get_image_features` and `get_video_features`.
            received (`Mapping`, *optional*):
                Kind -> what a later stage received; without it that stage's layers run on what has its shape.
        """
        body = self.model.get_submodule(self.body)
        found = {}
        for kind in kinds_of(inputs) or ("image",):
            self._begin(kind, None if received is None else received[kind])
            found[kind] = run_encoder(body, kind, inputs, self.keys)
        return found

    def incoming(self, inputs: Mapping[str, Any]) -> Shapes:
        """Shapes of what a later stage receives for these inputs: hidden states, and those of depths taken before it,
        side by side."""
        shapes = {}
        self.relay.probing = True
        try:
            with torch.no_grad():
                for kind in kinds_of(inputs) or ("image",):
                    self._begin(kind, None)
                    shape = self._until_stop(kind, inputs).shape
                    self._num_depths[kind] = self.relay.num_taken
                    shapes[kind] = (*shape[:-1], shape[-1] * (1 + self.relay.num_taken))
        finally:
            self.relay.probing = False
        return shapes

    def _begin(self, kind: str, received: torch.Tensor | None) -> None:
        relay = self.relay
        relay.live, relay.num_taken = self.first, 0
        relay.received, relay.depths = received, []
        if received is not None and self._num_depths[kind]:
            parts = received.chunk(1 + self._num_depths[kind], dim=-1)
            relay.received, *relay.depths = (part.contiguous() for part in parts)

    def _until_stop(self, kind: str, inputs: Mapping[str, Any]) -> torch.Tensor:
        try:
            run_encoder(self.model.get_submodule(self.body), kind, inputs, self.keys)
        except _Reached:
            reached, self.relay.reached = self.relay.reached, None
            assert reached is not None
            return reached
        raise ModelError("the encoder came to its end without running its layers; run it as one stage.")

    def forward(
        self,
        inputs: Mapping[str, Any],
        received: torch.Tensor | None,
        forms: Formats,
        shapes: Shapes | None = None,
    ) -> torch.Tensor:
        """Features `(rows, width)`, see `kinds`; before the last stage, what the next one receives.

        Args:
            inputs (`Mapping`): of the model's `get_image_features` and `get_video_features`.
            received (`torch.Tensor`, *optional*): what the stage before gave, on a later stage.
            forms (`Mapping`): kind -> format of the features; used on the last stage.
            shapes (`Mapping`, *optional*): with `received`, what `incoming` says for these inputs.
        """
        parts = None
        if received is not None:
            assert shapes is not None
            parts = unpack(received, shapes)
        try:
            if self.last:
                return join(self.encode(inputs, parts), forms, self.model.get_submodule(self.body), inputs)
            states = {}
            for kind in kinds_of(inputs) or ("image",):
                self._begin(kind, None if parts is None else parts[kind])
                hidden = self._until_stop(kind, inputs)
                depths = [depth for depth in self.relay.depths if depth is not hidden]  # that one is there already
                states[kind] = torch.cat([hidden, *depths], dim=-1) if depths else hidden
            return pack(states)
        finally:
            self.relay.received, self.relay.depths = None, []


def _keep_values(frame: nn.Module) -> None:
    """Parameters of a copied frame become plain values."""
    frame._non_persistent_buffers_set = set(frame._non_persistent_buffers_set)
    for name, parameter in list(frame._parameters.items()):
        if parameter is not None:
            del frame._parameters[name]
            frame.register_buffer(name, parameter.detach(), persistent=False)
