"""Encoder, connector, LLM and head of a built model as computations that can be run alone on a given size.

In: a built model and a size. Out: the inputs that the model itself would give each module. The images go through
`get_image_features` once; what the encoder and the connector are called with is caught on the way, so no model is
known by name:

    encoder     `get_encoder(modality="image")`
    connector   what is called behind the encoder's layers, holds matrices but none of the layers, and gives features
                as wide as the LLM: beside the encoder (LLaVA) or inside it (Qwen-VL)
    LLM         `get_decoder()`, from embeddings on
    head        `get_output_embeddings()` and the model's `loss_function`

Assumption: an encoder that takes a grid or image sizes computes images of any size, others tiles of one size.
"""

import inspect
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_dflop.cost.spec import ModelSpec
from hf_dflop.errors import ModelError
from hf_dflop.profile.measure_build import layer_stack

__all__ = ["Call", "ImageParts", "catch_image_calls", "float_tensors", "is_variable", "tile_lengths"]


@dataclass(kw_only=True, slots=True)
class Call:
    """A module and what it is called with."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def detached(self, *, requires_grad: bool) -> "Call":
        """The same call on copies of the floating inputs that may require gradients."""

        def copy(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.detach().clone().requires_grad_(requires_grad)
            if isinstance(value, list | tuple):
                return type(value)(copy(item) for item in value)
            return value

        return Call(
            module=self.module,
            args=tuple(copy(value) for value in self.args),
            kwargs={name: copy(value) for name, value in self.kwargs.items()},
        )

    def __call__(self) -> Any:
        return self.module(*self.args, **self.kwargs)


@dataclass(kw_only=True, slots=True)
class ImageParts:
    """What running the images showed."""

    encoder: Call
    connector: Call | None
    in_encoder: bool
    num_sequences: int
    tokens: int
    """Positions that the encoder's layers computed, class tokens included."""


def float_tensors(output: Any) -> list[torch.Tensor]:
    """Floating tensors in what a module returned."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in values for tensor in float_tensors(value)]


def _signature(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _takes_grid(model: Any) -> bool:
    return "image_grid_thw" in _signature(model.get_image_features)


def is_variable(model: Any) -> bool:
    """Whether the encoder computes images of any size, so that the length of its sequences varies."""
    encoder = model.get_encoder(modality="image")
    return _takes_grid(model) or "image_sizes" in _signature(encoder.forward)


def _merge_side(spec: ModelSpec, vision_config: Any) -> int:
    side = math.isqrt(spec.connector.merge)
    window = getattr(vision_config, "window_size", None)
    return side if side**2 == spec.connector.merge and window is None else max(side, 1)


def tile_lengths(spec: ModelSpec, config: Any, lengths: Sequence[int], *, variable: bool) -> list[tuple[int, int]]:
    """Heights and widths in patches, near the wanted lengths: near squares that the merging divides."""
    vision = getattr(config, "vision_config", config)
    if not variable:
        side = getattr(vision, "image_size", None)
        sides = [int(value) for value in side] if isinstance(side, list | tuple) else [int(side or 0)] * 2
        if min(sides) < spec.patch_size:
            raise ModelError(f"the vision config has image_size {side!r}: the size of a tile is not known.")
        return [(sides[0] // spec.patch_size, sides[1] // spec.patch_size)] * len(lengths)
    merge = _merge_side(spec, vision)
    found = []
    for length in lengths:
        height = max(round(math.sqrt(length) / merge), 1) * merge
        width = max(round(length / height / merge), 1) * merge
        found.append((height, width))
    return found


def _image_inputs(
    model: Any, spec: ModelSpec, grid: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Candidates for the arguments of `get_image_features`, by its signature: grids, or usual layouts of pixels."""
    names = _signature(model.get_image_features)
    height, width = grid
    if "image_grid_thw" in names:
        values = spec.channels * spec.temporal_patch_size * spec.patch_size**2
        pixels = torch.randn(count * height * width, values, dtype=dtype, device=device)
        return [{"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]] * count, device=device)}]
    size = (height * spec.patch_size, width * spec.patch_size)
    extra: dict[str, Any] = {}
    if "image_sizes" in names:
        extra["image_sizes"] = torch.tensor([size] * count, device=device)
    if "batch_num_images" in names:
        extra["batch_num_images"] = torch.tensor([count], device=device)
    layouts = ((count,), (count, 1), (1, count))
    return [
        {"pixel_values": torch.randn(*layout, spec.channels, *size, dtype=dtype, device=device), **extra}
        for layout in layouts
    ]


class _Catcher:
    """Hooks that note what the modules of the image path are called with."""

    def __init__(self, model: Any, spec: ModelSpec, depth: int) -> None:
        self.model, self.width = model, spec.llm.hidden
        self.encoder = model.get_encoder(modality="image")
        if not isinstance(self.encoder, nn.Module) or self.encoder is model:
            raise ModelError(f"{type(model).__name__} names no image encoder (get_encoder): it cannot be measured.")
        owner, name = layer_stack(self.encoder, depth)
        self.layers = getattr(owner, name)
        self.inside_layers = set(self.layers.modules())
        self.call: Call | None = None
        self.positions: tuple[int, ...] = ()
        self.candidates: list[Call] = []

    def enter(self, stack: ExitStack) -> None:
        stack.callback(self.encoder.register_forward_pre_hook(self._encoder, with_kwargs=True).remove)
        stack.callback(self.layers[0].register_forward_pre_hook(self._first_layer, with_kwargs=True).remove)
        decoder = set(self.model.get_decoder().modules())
        for module in self.model.modules():
            if module in self.inside_layers or module in decoder or self.inside_layers & set(module.modules()):
                continue
            if any(weight.ndim >= 2 for weight in module.parameters()):
                stack.callback(module.register_forward_hook(self._behind, with_kwargs=True).remove)

    def _encoder(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.call = Call(module=module, args=args, kwargs=dict(kwargs))

    def _first_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = next(iter(float_tensors((*args, *kwargs.values()))))
        self.positions = tuple(hidden.shape[:-1])

    def _behind(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = float_tensors(output)
        if self.positions and given and given[0].shape[-1] == self.width:
            self.candidates.append(Call(module=module, args=args, kwargs=dict(kwargs)))

    def connector(self) -> tuple[Call | None, bool]:
        """The outermost module behind the layers, outside of the encoder if there is one."""
        within = set(self.encoder.modules())
        outside = [call for call in self.candidates if call.module not in within]
        for chosen, inside in ((outside, False), ([c for c in self.candidates if c.module in within], True)):
            tops = [
                call
                for call in chosen
                if not any(call.module in set(other.module.modules()) - {other.module} for other in chosen)
            ]
            if tops:
                return max(tops, key=lambda call: sum(p.numel() for p in call.module.parameters())), inside
        return None, False


def catch_image_calls(
    model: Any, spec: ModelSpec, grid: tuple[int, int], count: int, *, depth: int, variable: bool
) -> ImageParts:
    """Run `count` images of `grid` patches, and give what encoder and connector were called with.

    Raises:
        ModelError: `get_image_features` takes none of the usual layouts, with the reason it gave.
    """
    device, dtype = next(model.parameters()).device, model.dtype
    reasons = []
    for inputs in _image_inputs(model, spec, grid, count, dtype, device):
        catcher = _Catcher(model, spec, depth)
        with ExitStack() as stack, torch.no_grad():
            catcher.enter(stack)
            try:
                model.get_image_features(**inputs)
            except Exception as error:  # what comes behind the connector (joining tiles) does not matter here
                reasons.append(f"{type(error).__name__}: {error}")
        call, in_encoder = catcher.connector()
        positions = math.prod(catcher.positions)
        tiles = catcher.positions[0] if len(catcher.positions) == 2 and not variable else count
        if catcher.call is None or not catcher.positions or tiles != count or (call is None and reasons):
            continue
        return ImageParts(
            encoder=catcher.call, connector=call, in_encoder=in_encoder, num_sequences=count, tokens=positions
        )
    raise ModelError(
        f"{type(model).__name__}.get_image_features does not take images of {grid[0]} × {grid[1]} patches in any "
        f"usual layout ({' '.join(reasons[-1].split())[:200] if reasons else 'other numbers of tiles came out'}). "
        "Measure whole microbatches instead, and use CostModel.fit."
    )
