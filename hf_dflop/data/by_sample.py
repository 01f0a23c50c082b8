"""Attention as varlen kernels do it, on any device: in a joined row each sample attends alone.

SDPA computes all pairs of a joined row and masks most of them. Here the row is cut where a sample begins, and SDPA
runs on each piece, so that a joined row costs what its samples cost.

In: a model whose LLM runs SDPA. Out: the same model under the attention `BY_SAMPLE`. Where transformers would build a
mask of (samples apart) and (causal), the layers get the samples' numbers instead, of shape `(1, tokens)`; where it
would build any other (padding, sliding windows, chunks, bidirectional images), that mask, and plain SDPA.

Assumption: mask rules are the closures of `transformers.masking_utils`; one that is not known there is never cut.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from hf_dflop.data.structure import ModelStructure, unwrapped

__all__ = ["BY_SAMPLE", "attend_by_sample"]

BY_SAMPLE = "sdpa_by_sample"
"""Its name as an `attn_implementation`, once `attend_by_sample` was called."""
_EDGES = "_sample_edges"
_JOINS = ("and_masks", "remap_positions_for_packed_sequence")
_SAMPLES = "packed_sequence_mask_function"


def attend_by_sample(model: Any) -> bool:
    """Let the samples of a joined row attend one by one where SDPA would compute all pairs of the row and mask most.

    Packed rows of many samples then cost what FlashAttention makes of them; padded rows, generation and evaluation go
    on as with SDPA.

    Args:
        model (`PreTrainedModel`): also one that holds adapters, or is wrapped.

    Returns:
        `bool`: whether the model's LLM does so now. `False`, and nothing is changed, for one that runs other
        attention (FlashAttention, flex, eager), or has a mask rule of its own (Gemma 3, PaliGemma).

    Raises:
        ModelError: not a model.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    model = unwrapped(model)
    structure = ModelStructure.of(model)
    if structure.attention not in ("sdpa", BY_SAMPLE) or structure.has_mask_rule:
        return False
    AttentionInterface.register(BY_SAMPLE, _attend)
    AttentionMaskInterface.register(BY_SAMPLE, _mask)
    for config in (model.config.get_text_config(), model.get_decoder().config):  # they may be copies
        config._attn_implementation = BY_SAMPLE
    return True


def _mask(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> Any:
    """Numbers of the samples `(1, tokens)` where a joined row is causal; else the mask of SDPA."""
    from transformers.masking_utils import sdpa_mask

    samples = None if kwargs.get("attention_mask") is not None else _samples(mask_function)
    if samples is None or samples.shape[0] != 1:
        return sdpa_mask(*args, mask_function=mask_function, **kwargs)
    setattr(samples, _EDGES, _edges(samples))  # once a forward, since a GPU is waited for
    return samples


def _samples(rule: Callable[..., Any]) -> Any | None:
    """What tells the samples apart in a rule that says nothing but that and causality."""
    import torch
    from transformers.masking_utils import causal_mask_function

    atoms = list(_atoms(rule))
    rest = [atom for atom in atoms if atom is not causal_mask_function]
    if len(rest) == 1 and len(atoms) > 1 and _maker(rest[0]) == _SAMPLES:
        return next((value for value in _held(rest[0]) if isinstance(value, torch.Tensor)), None)
    return None


def _atoms(rule: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The rules that a rule is joined of."""
    if _maker(rule) not in _JOINS:
        yield rule
        return
    for value in _held(rule):
        for part in value if isinstance(value, tuple) else (value,):
            if callable(part):  # positions are tensors, which are not
                yield from _atoms(part)


def _maker(rule: Callable[..., Any]) -> str:
    """The function that a closure was made by."""
    is_known = getattr(rule, "__module__", None) == "transformers.masking_utils"
    return rule.__qualname__.partition(".<locals>")[0] if is_known else ""


def _held(rule: Callable[..., Any]) -> list[Any]:
    return [cell.cell_contents for cell in getattr(rule, "__closure__", None) or ()]


def _edges(samples: Any) -> list[int]:
    """Where the samples of a row begin, and its end."""
    begins = (samples[0].diff() != 0).nonzero().flatten() + 1
    return [0, *begins.tolist(), samples.shape[1]]


def _attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Any, None]:
    """SDPA; on each sample of the row where the mask holds the samples' numbers."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.ndim != 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    edges = getattr(attention_mask, _EDGES, None) or _edges(attention_mask)
    parts = [
        sdpa_attention_forward(module, query[:, :, b:e], key[:, :, b:e], value[:, :, b:e], None, **kwargs)[0]
        for b, e in itertools.pairwise(edges)
    ]
    return torch.cat(parts, dim=1), None
