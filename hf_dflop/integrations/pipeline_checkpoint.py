"""The checkpoint of a pipeline's training: stock weights in a folder that appears whole.

In: a `PipelineModel`, a folder. Out: its weights as a stock checkpoint has them; a folder that gets its name last, so
that the newest `checkpoint-N` is complete whenever a process dies. `pipeline_state` writes the optimizer's part.

Assumption: all ranks see the same folder.
"""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from hf_dflop.errors import TrainerError
from hf_dflop.pipeline import PipelineModel

__all__ = ["STAGING_PREFIX", "clear_staging", "load_weights", "publish"]

STAGING_PREFIX = "_saving-"
"""Of a folder that is being written. Trainer looks for `checkpoint-N` alone, and pushes no `_*` to the Hub."""


def clear_staging(run_dir: str) -> None:
    """Rank 0 removes what a killed run left half-written."""
    if dist.get_rank() == 0:
        for left in Path(run_dir).glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()


def publish(staging: str, final: str) -> None:
    """Rank 0 gives the folder its name once all ranks have written; all ranks call it."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (*Path(staging).rglob("*"), Path(staging)):
            _to_disk(path)
        if os.path.isdir(final):  # the same step, saved again
            shutil.rmtree(final)
        os.rename(staging, final)
        _to_disk(Path(final).parent)
    dist.barrier()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_weights(pipe: PipelineModel, folder: str) -> None:
    """Copy this rank's share of a stock checkpoint into the pipeline, bit by bit.

    Raises:
        TrainerError: the checkpoint lacks a parameter of this rank.
    """
    dtype = torch.float32
    own = pipe.state_dict()
    for value in own.values():
        if value.is_floating_point():
            dtype = torch.promote_types(dtype, value.dtype)
    state = pipe.read_weights(folder, dtype)
    wanted = own.keys()
    if pipe.skeleton.has_adapters:  # the model under them is as it was given
        wanted = {name for name, parameter in pipe.named_parameters() if parameter.requires_grad}
    missing = sorted(wanted - state.keys())
    if missing:
        raise TrainerError(f"{folder} lacks {missing[0]} ({len(missing)} parameters); it is of another model.")
    with torch.no_grad():
        for name, value in own.items():
            if name in state:
                value.copy_(pipe.share(name, state[name]))
