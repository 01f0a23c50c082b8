"""The model's own loss without its logits: they are made, used and dropped for a few hundred tokens at a time.

With a vocabulary of 49,152 tokens the logits of a microbatch, their log-softmax and two gradients of that size are
most of a training step's memory. Here the head hands the hidden states on, and the loss multiplies them by its weight
piece by piece, forward and backward at once, as fused kernels do on GPUs. Same value, same gradients and the same
products (also of tokens without a label), for every sampler alike; evaluation sees logits as ever.

Assumption: a linear head without bias, whose output goes into `loss_function` as it is.
"""

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

__all__ = ["fuse_loss"]

_ROWS = 256  # tokens whose logits are in memory at a time
_IGNORED = -100


def fuse_loss(model: Any) -> None:
    """Let `model` compute its loss without keeping logits while gradients are wanted; copies of it do, too.

    Raises:
        ValueError: the head has a bias.
    """
    head = model.get_output_embeddings()
    if head.bias is not None:
        raise ValueError("the head has a bias")
    head.forward = partial(_hand_on, head)
    model.loss_function = partial(_loss, head)


def _hand_on(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return hidden if torch.is_grad_enabled() else torch.nn.functional.linear(hidden, head.weight)


def _loss(
    head: torch.nn.Linear,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss`; with gradients, `logits` are the hidden states that the head handed on."""
    if not torch.is_grad_enabled():
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, shift_labels=shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    flat = shift_labels.reshape(-1)
    total = _LinearCrossEntropy.apply(logits.reshape(len(flat), -1), head.weight, flat)
    return total / ((flat != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over the rows with a label of log Σ exp(logits) - logits[label], with logits = hidden × weightᵀ."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros(())
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        pieces = zip(hidden.split(_ROWS), hidden_grad.split(_ROWS), labels.split(_ROWS), strict=True)
        for rows, rows_grad, targets in pieces:
            logits = rows @ weight.T
            has_label = (targets != _IGNORED).unsqueeze(1).to(logits.dtype)
            places = targets.clamp(min=0).unsqueeze(1)
            norms = logits.logsumexp(dim=1, keepdim=True)
            total += ((norms - logits.gather(1, places)) * has_label).sum()
            grad = logits.sub_(norms).exp_().mul_(has_label).scatter_add_(1, places, -has_label)
            torch.mm(grad, weight, out=rows_grad)
            if weight_grad is not None:
                weight_grad.addmm_(grad.T, rows)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return grad * hidden_grad, None if weight_grad is None else grad * weight_grad, None
