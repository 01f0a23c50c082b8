"""Attention as varlen kernels do it, on any device: in a packed row each sample attends alone.

Stock SDPA computes all pairs of a joined row and masks most of them. Here the row is cut where a sample begins, and
SDPA runs on each piece, so that a packed row costs what its samples cost.

In: nothing. Out: the name under which transformers finds it.

Assumption: causal attention over whole rows (no sliding window); a row without padding needs no mask.
"""

import itertools
from typing import Any

import torch

__all__ = ["ATTENTION", "register_attention"]

ATTENTION = "sdpa_by_sample"


def register_attention() -> str:
    """Make `ATTENTION` known to transformers; returns the name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _mask)
    return ATTENTION


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """SDPA's mask where rows are padded; a packed row needs none, since its samples attend alone."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; a packed row is cut where a sample begins: at `cu_seq_lens_q`, or where positions restart.

    With `cu_seq_lens_q` in the host's memory a GPU is not waited for.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    edges = _edges(query, kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids"))
    if len(edges) <= 2:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    parts = [
        sdpa_attention_forward(module, query[:, :, b:e], key[:, :, b:e], value[:, :, b:e], None, **kwargs)[0]
        for b, e in itertools.pairwise(edges)
    ]
    return torch.cat(parts, dim=1), None


def _edges(query: torch.Tensor, lengths: torch.Tensor | None, positions: torch.Tensor | None) -> list[int]:
    """Where the samples of a packed row begin, and its end; nothing for rows that are not packed."""
    if query.shape[0] != 1:
        return []
    if lengths is not None:
        return [int(edge) for edge in lengths.tolist()]
    if positions is None or positions.shape[-1] != query.shape[2]:
        return []
    return [*(positions.reshape(-1) == 0).nonzero().flatten().tolist(), query.shape[2]]
