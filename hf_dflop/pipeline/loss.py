"""The loss of a step: the sum over label tokens, divided once by the label tokens of the whole optimizer step.

Each last stage computes its microbatches' share by the model's own loss (`num_items_in_batch`); the shares of all
microbatches and replicas add up to the loss that one process with the whole batch would have.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

__all__ = ["count_label_tokens", "sum_losses"]


def count_label_tokens(labels: torch.Tensor) -> int:
    """Labels `(rows, length)` after the shift that are not -100."""
    return int((labels[:, 1:] != -100).sum())


def sum_losses(losses: Iterable[torch.Tensor], label_tokens: int, device: torch.device) -> tuple[float, int]:
    """Loss and label tokens of the call, on every rank; ranks without a last stage give nothing."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for loss in losses:
        total[0] += loss.double()
    total[1] = label_tokens
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return loss_sum, int(tokens)
