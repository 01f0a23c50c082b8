"""The checkpoint of a pipeline's training: stock weights, optimizer state by name, in a folder that appears whole.

In: a `PipelineModel`, its optimizer. Out: files in a folder that gets its name last, so that the newest
`checkpoint-N` is complete whenever a process dies. Optimizer state lies under the stock parameter names, one file per
pipeline column, so that another plan can read it.

Assumption: all ranks see the same folder.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_dflop.errors import TrainerError
from hf_dflop.pipeline import PipelineModel

__all__ = ["STAGING_PREFIX", "clear_staging", "load_optimizer", "load_weights", "publish", "save_optimizer"]

STAGING_PREFIX = ".saving-"
"""Of a folder that is being written; Trainer looks for `checkpoint-N` alone."""
_FILE = "pipeline_optimizer_{column}.pt"


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
        for file in Path(staging).rglob("*"):
            if file.is_file():
                _to_disk(file)
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


def save_optimizer(pipe: PipelineModel, optimizer: Any, folder: str) -> None:
    """The first replica of each column writes the state of its parameters, whole, under their names.

    Raises:
        TrainerError: state of a tensor-parallel share is not of the share's shape.
    """
    if pipe.place.replica:
        return
    plain = getattr(optimizer, "optimizer", optimizer)
    state = {}
    for name, parameter in pipe.named_parameters():
        if parameter in plain.state:
            state[name] = {
                key: _whole(pipe, name, key, parameter, value) for key, value in plain.state[parameter].items()
            }
    if pipe.place.shard:
        return
    groups = [{key: value for key, value in group.items() if key != "params"} for group in plain.param_groups]
    torch.save({"state": state, "groups": groups}, os.path.join(folder, _FILE.format(column=pipe.place.column)))


def _whole(pipe: PipelineModel, name: str, key: str, parameter: Any, value: Any) -> Any:
    if pipe.shards is None or not pipe.shards.is_split(name) or not torch.is_tensor(value) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise TrainerError(
            f"the optimizer's {key} of {name} has the shape {tuple(value.shape)}, and this rank's share "
            f"{tuple(parameter.shape)}: it cannot be joined over tensor-parallel ranks. Use an optimizer that updates "
            "each number by itself, such as AdamW."
        )
    return pipe.whole(name, value).cpu()


def load_optimizer(pipe: PipelineModel, optimizer: Any, folder: str) -> None:
    """Take the state of this rank's parameters from a checkpoint, whatever plan wrote it.

    Raises:
        TrainerError: there is none, or the optimizer has other groups.
    """
    files = sorted(Path(folder).glob(_FILE.format(column="*")))
    if not files:
        raise TrainerError(
            f"{folder} has no {_FILE.format(column='N')}: no pipeline wrote its optimizer. Resume from a checkpoint "
            "of DflopTrainer that was saved with save_only_model=False."
        )
    state: dict[str, Any] = {}
    for file in files:
        read = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        groups = read["groups"]
        state = read["state"] | state
    plain = getattr(optimizer, "optimizer", optimizer)
    if len(groups) != len(plain.param_groups):
        raise TrainerError(
            f"the checkpoint's optimizer has {len(groups)} parameter groups, this one {len(plain.param_groups)}: "
            "resume with the same optimizer settings."
        )
    stand_in = _tied_name(pipe)
    index: dict[str, int] = {}
    found: dict[int, Any] = {}
    packed = []
    names = {parameter: name for name, parameter in pipe.named_parameters()}
    for group, options in zip(plain.param_groups, groups, strict=True):
        places = []
        for parameter in group["params"]:
            name = names[parameter]
            place = index.setdefault(name, len(index))
            places.append(place)
            values = state.get(name, state.get(stand_in.get(name, "")))
            if values is not None:
                found[place] = {
                    key: pipe.share(name, value).clone() if torch.is_tensor(value) else value
                    for key, value in values.items()
                }
        packed.append({**options, "params": places})
    plain.load_state_dict({"state": found, "param_groups": packed})


def _tied_name(pipe: PipelineModel) -> dict[str, str]:
    """Under which other name a plan without a copy keeps the state of a tied head, and the other way round."""
    if not pipe.structure.tied:
        return {}
    embedding = f"{pipe.structure.embedding}.weight"
    heads = [f"{head}.weight" for head in pipe.structure.head]
    return {**dict.fromkeys(heads, embedding), **({embedding: heads[0]} if heads else {})}


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
    state = pipe.skeleton.load(folder, dtype)
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
