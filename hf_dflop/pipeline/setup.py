"""What a plan asks of a model before it is cut: frozen modules, activation checkpointing.

In: a model, its structure, the plan's wishes. Out: the model, changed in place.
"""

from collections.abc import Collection
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_dflop.errors import PlanError
from hf_dflop.pipeline.structure import Structure

__all__ = ["checkpoint_layers", "freeze", "is_reentrant"]


def freeze(model: nn.Module, structure: Structure, frozen: Collection[str]) -> None:
    """Freeze "vision" (the tower), "connector" (the rest before the LLM) and "llm" (decoder and head)."""
    if not frozen:
        return
    if structure.tower is None and {"vision", "connector"} & set(frozen):
        raise PlanError(
            "the plan freezes vision or connector, but the model does not tell them apart (no get_encoder); freeze "
            "its parameters yourself and leave them out of plan.frozen."
        )
    llm = (structure.decoder, *structure.head)
    for name, parameter in model.named_parameters():
        if any(name.startswith(part + ".") for part in llm):
            part = "llm"
        else:
            part = "vision" if name.startswith(f"{structure.tower}.") else "connector"
        if part in frozen:
            parameter.requires_grad_(False)


def checkpoint_layers(model: nn.Module, structure: Structure, *, vision: bool, llm: bool) -> None:
    """Recompute layers in the backward, non-reentrant, where asked; what is on already stays on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    function = partial(checkpoint, use_reentrant=False)
    for name, module in model.named_modules():
        wanted = llm if name.startswith(structure.decoder + ".") else vision
        if wanted and isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = function


def is_reentrant(model: nn.Module) -> bool:
    """Whether a layer uses reentrant activation checkpointing."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True) and function is not None:
                return True
    return False
