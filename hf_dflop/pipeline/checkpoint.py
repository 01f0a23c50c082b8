"""A pipeline's weights → one stock checkpoint.

In: every rank's share. Out: on rank 0 a whole state dict with the stock names, written by the model's own
`save_pretrained`; of a model with adapters, theirs alone.

Assumption: rank 0's host has room for what is written.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from hf_dflop.pipeline.model import PipelineModel

__all__ = ["gather_state_dict", "save_stock"]


def gather_state_dict(pipe: "PipelineModel", names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """All ranks call it; rank 0 gets parameters and buffers of the whole model (of them `names`), on the CPU, others
    nothing."""
    rank, topology = pipe.place.rank, pipe.topology
    own = {} if pipe.place.replica else {name: value.detach() for name, value in pipe.state_dict().items()}
    if names is not None:
        own = {name: value for name, value in own.items() if name in names}
    shapes = {
        name: tuple(value.shape if pipe.shards is None else pipe.shards.whole_shape(name, value))
        for name, value in own.items()
    }
    told = [(name, shapes[name], str(value.dtype).removeprefix("torch.")) for name, value in own.items()]
    listed: list[Any] = [None] * pipe.plan.num_ranks
    dist.all_gather_object(listed, told if pipe.place.shard == 0 else [])
    gathered: dict[str, torch.Tensor] = {}
    for source, entries in enumerate(listed):
        place = topology.place(source)
        has_share = rank in topology.shards(place.stages[-1], place.replica)
        for name, shape, dtype in entries:
            value = pipe.whole(name, own[name]) if has_share else None
            if rank == source and rank:
                assert value is not None
                dist.send(value.contiguous(), dst=0)
            elif rank == 0 and source:
                value = torch.empty(shape, dtype=getattr(torch, dtype), device=pipe.wire.device)
                dist.recv(value, src=source)
            if rank == 0 and value is not None:
                gathered.setdefault(name, value.cpu())
    return gathered


def save_stock(pipe: "PipelineModel", folder: str, **kwargs: Any) -> None:
    """Gather (unless `state_dict` was), write on rank 0, and let no rank go on before it is written."""
    gathered = kwargs.pop("state_dict", None)
    state = gather_state_dict(pipe, pipe.skeleton.saved_names()) if gathered is None else gathered
    if pipe.place.rank == 0:
        pipe.skeleton.save(folder, state, **kwargs)
    dist.barrier()
