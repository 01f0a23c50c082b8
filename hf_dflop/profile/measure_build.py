"""Builds a few layers of a model with random weights, from its config alone.

In: a config, and a kind of layer. Out: a model with real widths and little depth. Which layers differ in kind is read
from the fields that list something per layer (`layer_types`, `fullatt_block_indexes`, `mlp_only_layers`, ...), never
from a name: layers with equal entries are of one kind.

Assumption: a field that lists layers by index, or holds one entry per layer, is the only thing that sets layers of a
stack apart.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_dflop.cost.config_fields import get
from hf_dflop.errors import ModelError

__all__ = ["LayerKind", "build", "layer_kinds", "layer_stack", "load_config", "shortened"]

_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layer", "layers")
_INDEXED = ("fullatt_block_indexes", "mlp_only_layers", "moe_layers")
"""Lists of the layers that are special."""
_LEVELS = ("deepstack_visual_indexes",)
"""Lists of layers that a copy of the connector reads: dropped, since the connector is measured by itself."""
_FIRST_DENSE = "first_k_dense_replace"
_SPARSE_STEPS = ("decoder_sparse_step", "interleave_moe_layer_step")
_SUB_CONFIGS = {
    "vision": ("vision_config", "visual_config", "vit_config", "vision_tower_config"),
    "llm": ("text_config", "llm_config", "language_config"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Layers of a stack that do the same."""

    layer: int
    """One of them."""
    num_layers: int


def load_config(model: Any, *, revision: str | None = None) -> Any:
    """A config object from what a user may name: a Hub id, a local folder, a config JSON file, a dict, a config.

    Raises:
        ModelError: nothing of the kind is there.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        return copy.deepcopy(model)
    try:
        if isinstance(model, str | Path) and Path(model).is_file():
            model = json.loads(Path(model).read_text(encoding="utf-8"))
        if isinstance(model, dict):
            fields = dict(model)
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoConfig.from_pretrained(str(model), revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{str(model)[:200]!r} gives no config: {str(error).splitlines()[0] if str(error) else error!r}. Name a "
            "model on the Hub, a folder with a config.json, or a JSON file of a config with its model_type."
        ) from error


def _sub(config: Any, module: str) -> Any:
    return get(config, *_SUB_CONFIGS[module], default=config if module == "llm" else None)


def _depth_field(config: Any) -> str:
    name = next((name for name in _DEPTHS if isinstance(getattr(config, name, None), int)), None)
    if name is None:
        raise ModelError(f"{type(config).__name__} has none of {', '.join(_DEPTHS)}: its depth is not known.")
    return name


def _is_per_layer(name: str, value: Any, depth: int) -> bool:
    """Whether a field holds one entry per layer: as long as the stack, and named so (`image_size` is not)."""
    named = any(word in name for word in ("layer", "block", "pattern"))
    return named and name not in _LEVELS and isinstance(value, list | tuple) and len(value) == depth


def _signatures(config: Any) -> list[tuple[Any, ...]]:
    """For each layer, its entries in all per-layer fields."""
    depth = getattr(config, _depth_field(config))
    per_layer = [
        value
        for name, value in sorted(vars(config).items())
        if name not in _INDEXED and _is_per_layer(name, value, depth)
    ]
    signatures = []
    for layer in range(depth):
        entries = [str(value[layer]) for value in per_layer]
        entries += [str(layer in (get(config, name) or ())) for name in _INDEXED]
        entries.append(str(layer >= int(get(config, _FIRST_DENSE, default=0))))
        entries += [str((layer + 1) % int(get(config, name, default=1) or 1) == 0) for name in _SPARSE_STEPS]
        signatures.append(tuple(entries))
    return signatures


def layer_kinds(config: Any, module: str) -> list[LayerKind]:
    """The kinds of layers of `"vision"` or `"llm"`, the most frequent first."""
    signatures = _signatures(_sub(config, module))
    kinds = [
        LayerKind(layer=signatures.index(signature), num_layers=signatures.count(signature))
        for signature in dict.fromkeys(signatures)
    ]
    return sorted(kinds, key=lambda kind: (-kind.num_layers, kind.layer))


def _cut(config: Any, depth: int, layer: int) -> None:
    """Make `config` one of `depth` layers that are all like `layer`."""
    name = _depth_field(config)
    whole = getattr(config, name)
    for field, value in list(vars(config).items()):
        if field in _LEVELS:
            setattr(config, field, [])
        elif field in _INDEXED:
            setattr(config, field, list(range(depth)) if layer in (value or ()) else [])
        elif _is_per_layer(field, value, whole):
            setattr(config, field, [value[layer]] * depth)
    if get(config, _FIRST_DENSE) is not None:
        setattr(config, _FIRST_DENSE, 0 if layer >= int(get(config, _FIRST_DENSE)) else depth)
    for field in _SPARSE_STEPS:
        if step := get(config, field):
            setattr(config, field, 1 if (layer + 1) % int(step) == 0 else depth + 1)
    setattr(config, name, depth)


def shortened(config: Any, module: str, *, depth: int, layer: int) -> Any:
    """A copy of the config with `depth` layers of one kind in `module`, and one layer in the other module."""
    short = copy.deepcopy(config)
    for name in ("vision", "llm"):
        part = _sub(short, name)
        if part is not None:
            _cut(part, depth if name == module else 1, layer if name == module else 0)
    if get(short, "vision_feature_layer") is not None:
        short.vision_feature_layer = -1  # the last one that is left
    return short


def build(config: Any, *, dtype: str, attention: str, device: torch.device) -> Any:
    """The model of a (shortened) config on the device, random weights, in training mode.

    Raises:
        ModelError: transformers cannot build it: not an image-text-to-text model, or an attention that is not there.
    """
    from transformers import AutoModelForImageTextToText

    try:
        with device:
            model = AutoModelForImageTextToText.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
    except (ValueError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{type(config).__name__} cannot be built with {attention} attention in {dtype}: "
            f"{str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    model.train()
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model


def layer_stack(module: nn.Module, depth: int) -> tuple[nn.Module, str]:
    """Where the layers of an encoder or decoder are: the owner and the name of its longest heavy `ModuleList`.

    Raises:
        ModelError: no list of `depth` equal layers.
    """
    found = [
        (sum(p.numel() for p in child.parameters()), owner, name)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth and len({type(layer) for layer in child}) == 1
    ]
    if not found:
        raise ModelError(
            f"{type(module).__name__} has no list of {depth} equal layers: its depth cannot be varied. "
            "Measure whole microbatches instead, and use CostModel.fit."
        )
    _, owner, name = max(found, key=lambda entry: entry[0])
    return owner, name
