"""The models' own loss with one copy of the logits in memory instead of three.

With a vocabulary of 49,152 tokens the logits are most of a training step's memory: torch keeps their log-softmax for
the backward pass, which then makes two more tensors of that size. Here the gradient is written over the logits when
it is asked for, so that half as many samples more fit into a process. Same value, same gradient, for every arm alike.

Assumptions: nobody reads the logits after the backward pass, and there is only one; both hold for Trainer.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

__all__ = ["causal_lm_loss"]

_ROWS = 64  # of logits at a time, so that what is computed on the way stays small
_IGNORED = -100


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss`, for `model.loss_function`.

    Args:
        logits: (..., tokens, vocabulary); the backward pass overwrites them.
        labels: (..., tokens), -100 where there is nothing to learn; token t predicts label t + 1.
        vocab_size: Size of the vocabulary.
        num_items_in_batch: What the sum over tokens is divided by; the label tokens here where None.
        shift_labels: Labels that are shifted already, instead of `labels`.
        kwargs: What else models hand to their loss.
    """
    if not logits.requires_grad:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, shift_labels=shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    flat = shift_labels.reshape(-1)
    total = _CrossEntropySum.apply(logits.view(-1, vocab_size), flat)
    return total / ((flat != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


class _CrossEntropySum(torch.autograd.Function):
    """Sum over the rows with a label of log Σ exp(logits) - logits[label]."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        norms = torch.cat([rows.logsumexp(dim=1) for rows in logits.split(_ROWS)])
        chosen = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(logits, labels, norms)
        return ((norms - chosen) * (labels != _IGNORED)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels, norms = (tensor.detach() for tensor in ctx.saved_tensors)
        weights = (grad * (labels != _IGNORED)).unsqueeze(1)
        places = labels.clamp(min=0).unsqueeze(1)
        parts = (tensor.split(_ROWS) for tensor in (logits, norms.unsqueeze(1), weights, places))
        for rows, norm, weight, place in zip(*parts, strict=True):
            rows.sub_(norm).exp_().mul_(weight).scatter_add_(1, place, -weight)
        return logits, None
