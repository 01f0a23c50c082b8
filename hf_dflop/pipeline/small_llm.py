"""A small copy of a model's LLM, for trying its stages before the first step.

In: the model's class and config, text inputs of a real microbatch. Out: a model of a few million weights on the CPU,
in float64, without encoder, and the same inputs for it.

The copy has the real class, layers, kinds of layers and head size; hidden size, width of MLPs and vocabulary are
small. Features are random.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dflop.pipeline.features import FeatureFormat
from hf_dflop.pipeline.kinds import Formats, sent_width
from hf_dflop.pipeline.shell import Foreign
from hf_dflop.pipeline.structure import read_structure

__all__ = ["small_copy", "small_features", "small_inputs", "to_double"]

_VOCABULARY = 512
_RESERVED = 64
_WIDTH = 32
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size")


def small_copy(
    model_class: Any, config: Any, tied: bool, *, degree: int = 1, max_layers: int | None = None
) -> tuple[Any, dict[int, int]]:
    """The copy, the same in every process, and the ids of special tokens in it by those of the model.

    Args:
        model_class (`type`), config (`PreTrainedConfig`): of the model.
        tied (`bool`): its head's weight is its token embedding.
        degree (`int`, defaults to 1): tensor-parallel ranks, each of which gets heads of its own.
        max_layers (`int`, *optional*): at most so many of its layers, the first ones.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    text.num_attention_heads, text.hidden_size = 2 * degree, 2 * degree * head_size
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = degree if key_heads < heads else 2 * degree
    if max_layers is not None and text.num_hidden_layers > max_layers:
        text.num_hidden_layers = max_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:max_layers]
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, _WIDTH * degree)
    ids = _reserve(small, text)
    text.vocab_size = _VOCABULARY
    if "flash" in (small._attn_implementation or ""):
        small._attn_implementation = "sdpa"  # on the CPU; the masks mean the same
    small._experts_implementation = "eager"  # grouped kernels know no float64
    with torch.device("meta"):
        whole = model_class(small).double()
    structure = read_structure(whole)
    decoder = type(whole.get_submodule(structure.decoder))(text).double()
    _put(whole, structure.decoder, decoder)
    for name in structure.encoder:
        _put(whole, name, Foreign())
    generator = torch.Generator().manual_seed(0)
    for name in structure.head:
        whole.get_submodule(name).to_empty(device="cpu")
    for parameter in whole.parameters():
        if parameter.ndim > 1 and not parameter.is_meta:
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    if tied:
        whole.get_output_embeddings().weight = whole.get_input_embeddings().weight
    return whole.eval(), ids


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def _reserve(config: Any, text: Any) -> dict[int, int]:
    """Token ids that the config names, moved into the small vocabulary; returns old -> new."""
    ids: dict[int, int] = {}
    for part in {id(config): config, id(text): text}.values():
        for name, value in list(vars(part).items()):
            if not name.endswith(("_token_id", "_token_index")):
                continue
            if isinstance(value, int):
                setattr(part, name, ids.setdefault(value, _VOCABULARY - 1 - len(ids)))
            elif isinstance(value, list) and all(isinstance(v, int) for v in value):
                setattr(part, name, [ids.setdefault(v, _VOCABULARY - 1 - len(ids)) for v in value])
    return ids


def small_inputs(inputs: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """Text inputs with tokens of the small vocabulary, which are their own labels; on the CPU, in float64."""
    given = {key: to_double(value) for key, value in inputs.items()}
    tokens = given["input_ids"].cpu()
    small = tokens % (_VOCABULARY - _RESERVED)
    for old, new in ids.items():
        small[tokens == old] = new
    given["input_ids"] = small
    given["labels"] = small.clone()
    return given


def to_double(value: Any) -> Any:
    """Tensors (in mappings, too) on the CPU, those of floating point in float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: to_double(part) for key, part in value.items()}
    return value


def small_features(model: Any, forms: Formats, rows: int) -> tuple[Formats, torch.Tensor | None]:
    """Random features of the copy's hidden size, and their formats."""
    if not forms or not rows:
        return {}, None
    width = int(model.config.get_text_config().hidden_size)
    small = {
        kind: FeatureFormat(
            width=width,
            trailing=None if form.trailing is None else (*form.trailing[:-1], width),
            extras=form.extras,
        )
        for kind, form in forms.items()
    }
    generator = torch.Generator().manual_seed(1)
    return small, torch.randn(rows, sent_width(small), generator=generator, dtype=torch.float64)
