"""The state of a pipeline's optimizer, as a distributed checkpoint of torch.

In: a `PipelineModel`, its optimizer. Out: a folder `optimizer`, written and read by `torch.distributed.checkpoint`:

    shard-*.safetensors   each rank's tensors `state.NAME.KEY`, where NAME is the parameter's stock name
    groups.json           options of the parameter groups, the names in each, and state that is no tensor

Replicas share the writing. A tensor-parallel share is a DTensor, written as the part of the whole that it is, so that
a rank of another plan reads just what it needs of it. Tied weights have one entry, under the name of the embedding.

The storage is that of Hugging Face files, not torch's default, whose index is a pickle.

Assumption: all ranks see the same folder.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from hf_dflop.errors import TrainerError
from hf_dflop.pipeline import PipelineModel

__all__ = ["load_optimizer", "save_optimizer"]

_FOLDER, _GROUPS, _STATE = "optimizer", "groups.json", "state."
_PLAIN = (bool, int, float, str, type(None))


def save_optimizer(pipe: PipelineModel, optimizer: Any, folder: str) -> None:
    """Write the state of all ranks' parameters; all ranks call it.

    Raises:
        TrainerError: state of a tensor-parallel share is not of the share's shape, or is no tensor or number.
    """
    place = Path(folder) / _FOLDER
    plain = getattr(optimizer, "optimizer", optimizer)
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []

    def collect() -> None:
        lasting = pipe.lasting_names()
        names = {parameter: name for name, parameter in pipe.named_parameters()}
        for group in plain.param_groups:
            shapes = {lasting[names[p]]: _whole_shape(pipe, names[p], p) for p in group["params"]}
            options = {key: _to_json(value) for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({"options": options, "shapes": shapes})
        memory: set[int] = set()
        for name, parameter in pipe.named_parameters():
            for key, value in plain.state.get(parameter, {}).items():
                if torch.is_tensor(value):
                    described = _described(pipe, name, key, parameter, value, memory)
                    tensors[f"{_STATE}{lasting[name]}.{key}"] = described
                elif isinstance(value, _PLAIN):
                    others.setdefault(lasting[name], {})[key] = value
                else:
                    raise TrainerError(
                        f"{type(plain).__name__} keeps a {type(value).__name__} as {key} of {name}; a checkpoint of a "
                        "pipeline holds tensors and numbers. Use another optimizer, or save_only_model=True."
                    )

    told = _agree(collect, lambda: (groups, others))
    if pipe.place.rank == 0:
        shutil.rmtree(place, ignore_errors=True)  # of an earlier save to the same folder
        place.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
    if pipe.place.rank == 0:
        ranks, states = zip(*told, strict=True)
        joined = [dict(same[0]) for same in zip(*ranks, strict=True)]
        for number, group in enumerate(joined):
            group["shapes"] = {name: shape for own in ranks for name, shape in own[number]["shapes"].items()}
        state = {name: values for own in states for name, values in own.items()}
        (place / _GROUPS).write_text(json.dumps({"groups": joined, "state": state}))


def load_optimizer(pipe: PipelineModel, optimizer: Any, folder: str) -> None:
    """Take the state of this rank's parameters from a checkpoint, whatever plan wrote it; all ranks call it.

    Raises:
        TrainerError: there is none, it is of another model, or the optimizer has other groups.
    """
    place = Path(folder) / _FOLDER
    plain = getattr(optimizer, "optimizer", optimizer)
    reader = HuggingFaceStorageReader(str(place))
    own = dict(pipe.named_parameters())
    named = {lasting: name for name, lasting in pipe.lasting_names().items()}
    groups: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {name: {} for name in own}
    targets: dict[str, torch.Tensor] = {}

    def prepare() -> None:
        if not (place / _GROUPS).is_file():
            raise TrainerError(
                f"{folder} has no {_FOLDER}/{_GROUPS}: no pipeline wrote its optimizer. Resume from a checkpoint of "
                "DflopTrainer that was saved with save_only_model=False."
            )
        told = json.loads((place / _GROUPS).read_text())
        groups.extend(told["groups"])
        _check_groups(pipe, plain, groups, folder)
        for lasting, values in told["state"].items():
            if lasting in named:
                found[named[lasting]] |= values
        for entry, saved in reader.read_metadata().state_dict_metadata.items():
            name = named.get(_split_entry(entry)[0])
            if name is not None:
                targets[entry] = _target(pipe, name, own[name], saved)

    _agree(prepare)
    dcp.load(targets, storage_reader=reader)
    for entry, value in targets.items():
        lasting, key = _split_entry(entry)
        name = named[lasting]
        found[name][key] = value.to_local() if isinstance(value, DTensor) else pipe.share(name, value)
    index = {parameter: at for at, parameter in enumerate(own.values())}
    packed = []
    for present, group in zip(plain.param_groups, groups, strict=True):
        options = {key: _from_json(value, present.get(key)) for key, value in group["options"].items()}
        kept = {key: value for key, value in present.items() if key == "param_names"}
        packed.append({**options, **kept, "params": [index[parameter] for parameter in present["params"]]})
    state = {index[own[name]]: values for name, values in found.items() if values}
    plain.load_state_dict({"state": state, "param_groups": packed})


def _split_entry(entry: str) -> tuple[str, str]:
    name, _, key = entry.removeprefix(_STATE).rpartition(".")
    return name, key


def _described(
    pipe: PipelineModel, name: str, key: str, parameter: Any, value: torch.Tensor, memory: set[int]
) -> torch.Tensor:
    """What is written: a share as the part of a whole that it is, in memory of its own."""
    value = value.detach().contiguous()
    if value.untyped_storage().data_ptr() in memory:  # safetensors writes no tensor twice
        value = value.clone()
    memory.add(value.untyped_storage().data_ptr())
    if pipe.shards is None or not pipe.shards.is_split(name) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise TrainerError(
            f"the optimizer's {key} of {name} has the shape {tuple(value.shape)}, and this rank's share "
            f"{tuple(parameter.shape)}: it cannot be joined over tensor-parallel ranks. Use an optimizer that updates "
            "each number by itself, such as AdamW."
        )
    return pipe.shards.describe(name, value) if pipe.shards.is_block(name) else pipe.whole(name, value)


def _target(pipe: PipelineModel, name: str, parameter: Any, saved: Any) -> torch.Tensor:
    """What to read an entry into."""
    shape, dtype = tuple(saved.size), saved.properties.dtype
    shards = pipe.shards
    if shards is None or not shards.is_split(name) or not shards.is_block(name):
        return torch.empty(shape, dtype=dtype)
    if shape != _whole_shape(pipe, name, parameter):
        return torch.empty(shape, dtype=dtype)
    return shards.describe(name, torch.empty(parameter.shape, dtype=dtype, device=pipe.wire.device))


def _whole_shape(pipe: PipelineModel, name: str, parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.shape if pipe.shards is None else pipe.shards.whole_shape(name, parameter))


def _check_groups(pipe: PipelineModel, optimizer: Any, groups: list[dict[str, Any]], folder: str) -> None:
    if len(groups) != len(optimizer.param_groups):
        raise TrainerError(
            f"the checkpoint's optimizer has {len(groups)} parameter groups, this one {len(optimizer.param_groups)}: "
            "resume with the same optimizer settings."
        )
    held = {name: number for number, group in enumerate(groups) for name in group["shapes"]}
    lasting = pipe.lasting_names()
    names = {parameter: name for name, parameter in pipe.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = lasting[names[parameter]]
            if held.get(name) != number:
                there = "lacks it" if name not in held else f"has it in group {held[name]}"
                raise TrainerError(
                    f"{name} is in the optimizer's group {number}; the optimizer of {folder} {there}. Resume with the "
                    "same model, the same frozen parts and the same optimizer settings."
                )
            shape = _whole_shape(pipe, names[parameter], parameter)
            if tuple(groups[number]["shapes"][name]) != shape:
                raise TrainerError(
                    f"{name} has the shape {shape}, and {tuple(groups[number]['shapes'][name])} in {folder}: it is of "
                    "another model."
                )


def _agree(tried: Callable[[], None], tell: Callable[[], Any] = lambda: None) -> list[Any]:
    """What every rank tells; what one of them finds wrong is raised on all, so that none waits for it."""
    told: list[Any] = [None] * dist.get_world_size()
    own: tuple[str | None, Any]
    try:
        tried()
        own = (None, tell())
    except TrainerError as error:
        own = (str(error), None)
    dist.all_gather_object(told, own)
    for message, _ in told:
        if message is not None:
            raise TrainerError(message)
    return [value for _, value in told]


def _to_json(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else value


def _from_json(value: Any, present: Any) -> Any:
    """An option with the type that it has now: a tensor (of a captured optimizer), or a tuple."""
    if torch.is_tensor(present):
        return torch.as_tensor(value, dtype=present.dtype, device=present.device)
    return tuple(value) if isinstance(value, list) else value
