"""Copies of a model's frame that share its parts: how one set of weights becomes several stages.

In: a model and what to put in place of some of its modules. Out: a model of the same class whose modules on the way to
the replaced ones are copies and whose every other module *is* the original's: weights, adapters, hooks, buffers.

Assumption: no module on the way has a `forward` of its own instance (a wrapper bound to the original).
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError

__all__ = ["Foreign", "Inject", "Received", "drop", "shell"]

_PLAIN = (bool, int, float, str)


class Foreign(nn.Module):
    """Stands for a module of another stage: hands its first argument on. Keeps what a loop may ask of a layer."""

    def __init__(self, original: nn.Module | None = None) -> None:
        super().__init__()
        for name, value in {} if original is None else vars(original).items():
            if not name.startswith("_") and name != "training" and isinstance(value, _PLAIN):
                setattr(self, name, value)

    def forward(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class Received(nn.Module):
    """Stands for the token embedding of a stage after the first: gives what the stage before sent."""

    def __init__(self) -> None:
        super().__init__()
        self.value: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class Inject(Foreign):
    """Stands for the model's first layer on a later stage: drops what precedes the layers (scaled embeddings)."""

    def __init__(self, original: nn.Module, source: Received) -> None:
        super().__init__(original)
        self._source = [source]  # in a list, so that it is no submodule twice

    def forward(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self._source[0].value


def shell(model: nn.Module, replace: Mapping[str, nn.Module], without_parameters: Collection[str] = ()) -> nn.Module:
    """A copy of the frame of `model` with the modules `replace` (by qualified name).

    Args:
        model (`nn.Module`): the whole model; it is not changed.
        replace (`Mapping[str, nn.Module]`): qualified name -> what stands there in the copy.
        without_parameters (`Collection[str]`): qualified names of modules whose own parameters the copy lacks.

    Raises:
        ModelError: a module of the frame is wrapped (a device map, a patched `forward`).
    """
    copies: dict[str, nn.Module] = {}

    def frame(name: str) -> nn.Module:
        if name not in copies:
            if not name:
                copies[name] = _shallow(model, name)
            else:
                parent, _, leaf = name.rpartition(".")
                above = frame(parent)
                copies[name] = above._modules[leaf] = _shallow(above._modules[leaf], name)
        return copies[name]

    for name, module in replace.items():
        parent, _, leaf = name.rpartition(".")
        frame(parent)._modules[leaf] = module
    for name in without_parameters:
        copy = frame(name)
        copy._parameters = dict.fromkeys(copy._parameters)
    return copies.get("", model)


def _shallow(module: Any, name: str) -> nn.Module:
    if "forward" in vars(module):
        raise ModelError(
            f"{name or type(module).__name__} has a forward of its own instance (a device map, or a patch); load the "
            "model without device_map, and give it before it is prepared or wrapped."
        )
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(vars(module))
    for registry in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[registry] = dict(vars(module)[registry])
    return copy


def drop(model: nn.Module, names: Collection[str], without_parameters: Collection[str] = ()) -> None:
    """Free the modules `names` of `model`, in place: what no stage of this rank needs."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        above = model.get_submodule(parent)
        above._modules[leaf] = Foreign(above._modules[leaf])
    for name in without_parameters:
        module = model.get_submodule(name)
        module._parameters = dict.fromkeys(module._parameters)
