"""A checkpoint → a model with the weights that one rank needs; those of other ranks stay on the meta device.

transformers' own `from_pretrained` builds the model without memory, then takes the checkpoint's tensors one by one:
renames them, joins those of experts, casts them, and puts each on the device that a map says. Here the map says `meta`
for what this rank does not need, and the tensors that it is given read themselves from their file when they are put on
any other device. Names, dtypes, tied weights, buffers and the report stay transformers' own.

Read whole: what is no safetensors file, is quantised or goes to several devices; and a checkpoint that lacks weights,
or has them in other shapes, since these are initialised, which must draw the same random numbers on every rank.

In: a call of `from_pretrained`, the names that are not needed. Out: what the call returns.

Assumption: transformers reads in `PreTrainedModel._load_pretrained_model` (5.17 and later; else all is read).
"""

import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["Unread", "read_needed"]

logger = logging.getLogger(__name__)

Unread = tuple[Collection[str], Collection[str]]
"""Modules that are not needed, and modules whose own parameters are not needed."""

_LOCK = threading.RLock()
_READER = "_load_pretrained_model"
_GIVEN = ("model", "state_dict", "checkpoint_files", "load_config")


def read_needed(load: Callable[[], Any], unread: Callable[[Any], Unread]) -> Any:
    """What `load()` returns, with the weights that `unread` names on the meta device where they can be left out.

    Args:
        load (`Callable`): calls `from_pretrained` of a model.
        unread (`Callable`): the model, still without weights → what of it is not needed.
    """
    from transformers import PreTrainedModel

    stock: Any = getattr(PreTrainedModel, _READER, None)
    if stock is None or not set(_GIVEN) <= signature(stock).parameters.keys():
        logger.warning("every rank reads the whole checkpoint: this version of transformers reads it in another way.")
        return load()
    caller, begun = threading.get_ident(), False

    def read(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **more: Any) -> Any:
        nonlocal begun
        whole = partial(stock, model, state_dict, checkpoint_files, load_config, **more)
        if begun or threading.get_ident() != caller:  # adapters; a model that another thread loads
            return whole()
        begun = True
        part = _Part(model, *unread(model))
        reason = _whole(state_dict, checkpoint_files, load_config)
        if reason is None:
            with ExitStack() as files:
                tensors = {
                    key: _OnDemand(file.get_slice(key))
                    for file in [files.enter_context(safe_open(path, framework="pt")) for path in checkpoint_files]
                    for key in file.offset_keys()
                }
                found = part.read(partial(stock, model, tensors, checkpoint_files, **more), load_config)
            reason = part.lacking
            if reason is None:
                return found
        logger.warning("every rank reads the whole checkpoint: %s.", reason)
        return whole()

    with _LOCK:
        setattr(PreTrainedModel, _READER, staticmethod(read))
        try:
            return load()
        finally:
            setattr(PreTrainedModel, _READER, staticmethod(stock))


def _whole(state_dict: Any, checkpoint_files: Any, load_config: Any) -> str | None:
    """Why nothing can be left out."""
    if load_config.hf_quantizer is not None:
        return "it is quantised"
    if state_dict is not None:
        return "its weights were given as a state_dict"
    if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
        return "it is not in safetensors files"
    if load_config.device_mesh is not None or set(load_config.device_map or {}) - {""}:
        return "transformers is to spread it over devices"
    return None


class _OnDemand:
    """A tensor of a file, which is read when it is put on a device that holds values. transformers asks of it what it
    asks of a slice of a file."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def __getitem__(self, index: Any) -> "_OnDemand":
        return self

    def to(self, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
        if str(device) == "meta":
            return torch.empty(self.stored.get_shape(), dtype=dtype, device="meta")
        tensor: torch.Tensor = self.stored[...].to(device=device, dtype=dtype)
        return tensor


class _Places(dict[str, Any]):
    """How names begin → a device. transformers makes one expression of the keys as they are, where `layers.1.` is also
    `layers.10`, and looks up what it has matched."""

    def keys(self) -> Any:
        return [re.escape(key) for key in self]


class _Part:
    """What of a model is needed."""

    def __init__(self, model: Any, names: Iterable[str], bare: Iterable[str]) -> None:
        self.model = model
        self.modules = tuple(f"{name}." for name in names)
        own = ((name, model.get_submodule(name)) for name in bare)
        self.values = {f"{name}.{key}" for name, module in own for key in (*module._parameters, *module._buffers)}
        groups: dict[str, set[str]] = {}
        for target, source in model.all_tied_weights_keys.items():
            groups.setdefault(source, {source}).add(target)
        self.ties = tuple(groups.values())
        self.lacking: str | None = None

    def is_unread(self, name: str) -> bool:
        return name.startswith(self.modules) or name in self.values

    def read(self, stock: Callable[[Any], Any], load_config: Any) -> Any:
        """What transformers' reader returns; in `lacking`, why that will not do."""
        kept = {name for tie in self.ties if not all(map(self.is_unread, tie)) for name in tie}
        default = (load_config.device_map or {}).get("", "cpu")
        while True:
            places = dict.fromkeys((*self.modules, *self.values), "meta") | dict.fromkeys(kept, default)
            read = stock(replace(load_config, device_map=_Places({"": default} | places)))
            missing = read[0].missing_and_mismatched()
            twice = {name for tie in self.ties if len(tie - missing) > 1 for name in tie} - kept
            if not twice:
                break
            kept |= twice  # whether these are tied depends on their values
        tied = {name for tie in self.ties if tie - missing for name in tie}
        lost = sorted(missing - tied)
        state = self.model.state_dict().items()
        left = [n for n, v in state if v.is_meta and n not in missing and n not in kept and not self.is_unread(n)]
        if lost:
            self.lacking = f"{lost[0]} ({len(lost)} weights) is not in it as the model has it, and is initialised"
        elif read[0].conversion_errors or left:
            self.lacking = "its tensors are joined in a way that leaves none out"
        return read
