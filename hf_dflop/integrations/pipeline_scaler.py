"""float16 over a pipeline: one scale of the loss, and all ranks skip a step that overflowed on one of them.

In: an `Accelerator` that is to run fp16, a pipeline. Out: a scaler on both. The schedule's backward begins with the
scaled loss; gradients are unscaled before they are clipped, and what was found on a rank counts on all.
"""

from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from hf_dflop.pipeline import PipelineModel

__all__ = ["scale_together"]


class _AgreeingScaler(ShardedGradScaler):
    """torch's scaler for sharded models, which agrees where it unscales: so it unscales for every optimizer."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        # A fused optimizer would unscale by itself, by what its own rank found.
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
