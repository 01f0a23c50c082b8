"""Gradients after the schedule: summed over replicas, over the two copies of tied embeddings, and their norm.

In: the parameters of a rank, process groups. Out: the same gradients as one process with the whole batch has, `None`
included: where no replica has a gradient the parameter keeps none, so that the optimizer leaves it alone (weight decay
would move it otherwise), as in the stock run.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["clip_gradients", "same_everywhere", "squared_norm", "sum_gradients", "take_first"]

BUCKET_BYTES = 64 * 2**20


def sum_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Sum `.grad` over the ranks of `group`, which hold the same parameters in the same order."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters or dist.get_world_size(group) == 1:
        return
    device = parameters[0].device
    has_grad = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(has_grad, op=dist.ReduceOp.MAX, group=group)
    with_grad = [p for p, has in zip(parameters, has_grad.tolist(), strict=True) if has]
    for parameter in with_grad:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _in_buckets(with_grad, lambda flat: dist.all_reduce(flat, group=group))


def take_first(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """All ranks of `group` take the first one's gradients, of which they have the same."""
    source = dist.get_global_rank(group, 0)
    _in_buckets(parameters, lambda flat: dist.broadcast(flat, source, group=group))


def _in_buckets(parameters: Iterable[nn.Parameter], communicate: Callable[[torch.Tensor], Any]) -> None:
    """Run a collective in place on the gradients, several small ones at once."""
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            communicate(bucket[0])
            continue
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        communicate(flat)
        at = 0
        for grad in bucket:
            grad.copy_(flat[at : at + grad.numel()].view_as(grad))
            at += grad.numel()


def _buckets(grads: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Runs of gradients of one dtype, of at most `BUCKET_BYTES` unless one is larger."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for grad in grads:
        num_bytes = grad.numel() * grad.element_size()
        if not buckets or buckets[-1][0].dtype != grad.dtype or size + num_bytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += num_bytes
    return buckets


def squared_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """Squared 2-norm of the gradients, float64 scalar."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(
        [torch.linalg.vector_norm(grad.float() if _is_half(grad) else grad).double() for grad in grads]
    )
    return norms.square().sum()


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scale the gradients as `torch.nn.utils.clip_grad_norm_` does for that norm."""
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(coefficient.to(parameter.grad.dtype))


def same_everywhere(parameters: Sequence[nn.Parameter], group: Any, device: torch.device) -> bool:
    """Whether the ranks of `group` hold the same values, by a sum and a sum of squares of each parameter; `device` is
    one of which the group sends tensors."""
    if not parameters or dist.get_world_size(group) == 1:
        return True
    sums = torch.stack(
        [s for p in parameters for s in (p.detach().double().sum(), p.detach().double().square().sum())]
    )
    extremes = torch.cat([sums, -sums]).to(device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, least = extremes[: sums.numel()], -extremes[sums.numel() :]
    return bool(torch.equal(most, least))
