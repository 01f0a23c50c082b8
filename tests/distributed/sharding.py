"""FSDP2 under a stock Trainer without a GPU.

accelerate 1.15 looks at `fsdp=` only where it found accelerators: on CPU it drops the plugin without a word and uses
DDP. Nothing in its FSDP2 path needs a GPU, so here the state says for a moment that it has found some. Trainer,
accelerate's `prepare` and torch's `fully_shard` then run as they are, over gloo.
"""

import os
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["FSDP_ARGUMENTS", "assert_sharded", "let_cpus_shard"]

FSDP_ARGUMENTS: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["CLIPEncoderLayer", "LlamaDecoderLayer"]},
}


def let_cpus_shard() -> None:
    """From now on, an `Accelerator` with an FSDP plugin shards on CPU too. For a process of its own."""
    stock = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        found = PartialState._shared_state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and (
            found.get("distributed_type") == DistributedType.MULTI_CPU
        ):
            found["distributed_type"] = DistributedType.MULTI_GPU
        stock(self, *args, **kwargs)

    AcceleratorState.__init__ = initialise  # type: ignore[method-assign]


def assert_sharded(trainer: Any, *, num_layers: int = 4) -> None:
    """The model that trained is in FSDP2, this many layers of encoder and LLM in a unit of their own."""
    units = [module for module in trainer.model_wrapped.modules() if isinstance(module, FSDPModule)]
    layers = [m for m in units if type(m).__name__.removeprefix("FSDP") in ("CLIPEncoderLayer", "LlamaDecoderLayer")]
    assert len(layers) == num_layers, [type(module).__name__ for module in units]
    assert isinstance(trainer.model_wrapped, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model_wrapped.parameters())
