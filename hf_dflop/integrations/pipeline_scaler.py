"""float16 over a pipeline: one scale of the loss, and all ranks skip a step that overflowed on one of them.

In: an `Accelerator` that is to run fp16, a pipeline. Out: a scaler on both. The schedule's backward begins with the
scaled loss; gradients are unscaled before they are clipped, and what was found on a rank counts on all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import OptState

from hf_dflop.pipeline import PipelineModel

__all__ = ["scale_together"]


class _AgreeingScaler(torch.amp.GradScaler):
    """Agrees with the other ranks where it unscales, so it unscales before every step, for fused optimizers, too.

    torch's `ShardedGradScaler` agrees as well, but fused optimizers do not take what it found.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        if self._enabled:
            scale = self._scale
            assert scale is not None
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            # A rank may have no gradient at all.
            dist.all_reduce(found.setdefault(scale.device, torch.zeros_like(scale)), op=dist.ReduceOp.MAX)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if self._enabled and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self.unscale_(optimizer)
        return super().step(optimizer, *args, **kwargs)


def scale_together(accelerator: Any, pipe: PipelineModel) -> None:
    """Give accelerator and pipeline a scaler, if fp16 is asked for; before an optimizer is prepared."""
    if accelerator.mixed_precision != "fp16":
        return
    handler = accelerator.scaler_handler
    settings = {} if handler is None else handler.to_kwargs()
    accelerator.scaler = pipe.scaler = _AgreeingScaler(pipe.wire.device.type, **settings)
    accelerator.native_amp = True  # accelerate has none on the CPU
