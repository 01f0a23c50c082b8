"""A call of the pipeline whose gradients wait for `loss.backward()`, as a loop written for a plain model expects.

In: a pipeline and a batch. Out: the loss as a tensor. The schedule has run forward and backward when it is returned;
its gradients are kept apart until the tensor's backward adds them to `.grad`, times what the loss was multiplied by.

Assumption: every rank calls backward on the loss, or none does: replicas are summed there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_dflop.errors import ModelError
from hf_dflop.pipeline.batch import StepBatch

if TYPE_CHECKING:
    from hf_dflop.pipeline.model import PipelineModel

__all__ = ["PipelineOutput", "deferred_call"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOutput:
    """What calling a `PipelineModel` gives, on every rank."""

    loss: torch.Tensor
    """Sum of token losses of the call ÷ label tokens of the optimizer step × `loss_factor` of the model, a scalar."""
    label_tokens: int
    """Label tokens of the call."""


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, loss: torch.Tensor, add: Callable[[float], None]) -> torch.Tensor:
        ctx.add = add
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.add(float(grads[0]))
        return None, None, None


def deferred_call(pipe: "PipelineModel", batch: StepBatch, *, sync: bool) -> PipelineOutput:
    """Run the schedule; `loss.backward()` adds the gradients.

    Args:
        pipe (`PipelineModel`), batch (`StepBatch`): the same call on every rank.
        sync (`bool`): sum gradients over replicas in the backward of the loss.
    """
    parameters = list(pipe.parameters())
    held = [parameter.grad for parameter in parameters]
    needed_sum = pipe.needs_sum
    for parameter in parameters:
        parameter.grad = None
    try:
        result = pipe.step(batch, sync=False)
        waiting = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    finally:
        for parameter, grad in zip(parameters, held, strict=True):
            parameter.grad = grad
        pipe.needs_sum = needed_sum
    loss_factor = pipe.loss_factor
    if pipe.scaler is not None:  # the gradients are scaled already, and what the loss is multiplied by holds the scale
        loss_factor /= pipe.scaler.get_scale()
    done = False

    def add(times: float) -> None:
        nonlocal done
        if done:
            raise ModelError("backward was called twice on the loss of one pipeline call; call the model again.")
        done = True
        pipe.add_gradients(waiting, times * loss_factor)
        waiting.clear()
        if sync:
            pipe.sum_gradients()

    anchor = torch.zeros((), device=pipe.wire.device, requires_grad=True)
    loss = torch.tensor(result.loss * pipe.loss_factor, dtype=torch.float64, device=pipe.wire.device)
    return PipelineOutput(loss=_Backward.apply(anchor, loss, add), label_tokens=result.label_tokens)
