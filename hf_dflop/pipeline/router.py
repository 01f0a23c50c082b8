"""The balancing loss of a mixture of experts, whose routers lie on several stages.

The loss is no sum over layers: it multiplies means over the router logits of all of them. So every stage sends the
logits of its own and of all earlier layers on, beside its hidden states, and the last one's own code computes the loss
from all of them; gradients come back the same way.

In: a model. Out: the `Router`s of each layer, from which all ranks know what travels; both ends of the wire.

Assumptions: the decoder names its routers for transformers' recording of outputs (`_can_record_outputs`); a router
gives numbers for each position, in the order of positions.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError
from hf_dflop.pipeline.structure import Structure

__all__ = ["LayerRouters", "Router", "join_logits", "read_routers", "sent_widths", "split_logits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """What one router gives for a position."""

    width: int
    """Numbers: its experts."""
    dtype: torch.dtype


LayerRouters = tuple[tuple[Router, ...], ...]
"""The routers of each layer: none where it is dense, and nowhere where the loss is not asked for."""


def read_routers(model: Any, structure: Structure, autocast: torch.dtype | None = None) -> LayerRouters:
    """Routers whose logits the loss of `model` takes, computed under `autocast`.

    Raises:
        ModelError: `output_router_logits` is set, and the class computes no loss from them, or it cannot be told what
            they give, or they would lose digits on their way.
    """
    name = type(model).__name__
    text_config = model.config.get_text_config()
    if not any(getattr(config, "output_router_logits", False) for config in (model.config, text_config)):
        return ((),) * structure.num_layers
    if "output_router_logits" not in inspect.signature(type(model).forward).parameters:
        raise ModelError(f"output_router_logits is set, but {name} computes no balancing loss: unset it.")
    recorded = getattr(model.get_submodule(structure.decoder), "_can_record_outputs", None) or {}
    if "router_logits" not in recorded:
        raise ModelError(
            f"output_router_logits is set, but the decoder of {name} does not tell which modules its router logits "
            "are recorded of: they cannot be sent between stages. Unset it."
        )
    layers = model.get_submodule(structure.layers)
    found = tuple(
        tuple(_probe(module, index, structure.hidden_size, autocast) for module, index in _modules(layer, recorded))
        for layer in layers.children()
    )
    sent = model.get_input_embeddings().weight.dtype
    for router in (router for routers in found for router in routers):
        if torch.promote_types(router.dtype, sent) != sent and sent.itemsize < router.dtype.itemsize:
            raise ModelError(
                f"the routers of {name} give {router.dtype}, and its stages send {sent}: the balancing loss would "
                "differ. Load the model in float32 and compute under autocast, or unset output_router_logits."
            )
    return found


def _modules(layer: nn.Module, recorded: dict[str, Any]) -> Iterator[tuple[nn.Module, int]]:
    """Modules of a layer whose output is recorded, in order, and where in the output the logits are."""
    given = recorded["router_logits"]
    for name, module in layer.named_modules():
        for spec in given if isinstance(given, list) else [given]:
            target = getattr(spec, "target_class", spec)
            within = getattr(spec, "layer_name", None)
            if not isinstance(target, type):
                raise ModelError(f"router logits are recorded of {spec!r}, which is no class: unset the loss.")
            if isinstance(module, target) and (within is None or f".{within.strip('.')}." in f".{name}."):
                yield module, getattr(spec, "index", 1)


def _probe(module: nn.Module, index: int, hidden_size: int, autocast: torch.dtype | None) -> Router:
    weight = next(module.parameters())
    if weight.is_meta:  # of another rank, and never read: what it gives does not depend on its values
        module = copy.deepcopy(module).to_empty(device="cpu")
        weight = next(module.parameters())
        for value in (*module.parameters(), *module.buffers()):
            value.detach().zero_()
    context = torch.autocast(weight.device.type, dtype=autocast, enabled=autocast is not None)
    try:
        with torch.no_grad(), torch.random.fork_rng([]), context:
            output = module(torch.zeros(1, 2, hidden_size, dtype=weight.dtype, device=weight.device))
        logits = output[index] if isinstance(output, tuple) else output
        return Router(width=int(logits.shape[-1]), dtype=logits.dtype)
    except Exception as error:
        raise ModelError(
            f"output_router_logits is set, and {type(module).__name__} cannot be asked for the number of its logits "
            f"({type(error).__name__}: {error}): they cannot be sent between stages. Unset it."
        ) from error


def sent_widths(routers: LayerRouters, ranges: Iterable[range], hidden_size: int) -> tuple[int, ...]:
    """Numbers that each LLM stage sends for a position: hidden states, router logits up to its last layer."""
    return tuple(
        hidden_size + sum(router.width for layer in routers[: layers.stop] for router in layer) for layers in ranges
    )


def join_logits(hidden: torch.Tensor, earlier: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a stage sends, `(rows, length, hidden + logits)`: hidden states, router logits of `(tokens, experts)`."""
    if not earlier and not own:
        return hidden
    logits = [part.reshape(*hidden.shape[:-1], part.shape[-1]) for part in (*earlier, *own)]
    return torch.cat([hidden, *logits], dim=-1)


def split_logits(
    received: torch.Tensor, hidden_size: int, routers: Sequence[Router]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Inverse of `join_logits`: hidden states and the logits of all earlier layers, as those of one process."""
    if not routers:
        return received, ()
    hidden, *logits = received.split([hidden_size, *(router.width for router in routers)], dim=-1)
    parts = (part.reshape(-1, part.shape[-1]).to(r.dtype) for part, r in zip(logits, routers, strict=True))
    return hidden.contiguous(), tuple(parts)
