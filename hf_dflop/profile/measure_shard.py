"""Makes of a layer what one tensor-parallel rank holds of it.

In: a built stack of layers and a degree. Out: the same layers with narrower matrices: in each branch of a layer
(attention, MLP) the last matrix is split by its inputs and the ones before it by their outputs, as tensor parallelism
does; counts of heads in the attention module are divided. Which matrix is last is seen by running the layer.

Assumptions: a branch is a chain of `nn.Linear`, split without communication inside; what is not one (experts, norms
over all heads, packed parameters) is refused. Communication is not measured.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from hf_dflop.cost.spec import TransformerSpec
from hf_dflop.errors import ModelError

__all__ = ["check_degree", "shard_head", "shard_layers"]


def check_degree(spec: TransformerSpec, module: str, tp: int) -> None:
    """Refuse degrees that do not divide the heads and widths.

    Raises:
        ModelError: a degree that does not divide, or a mixture of experts.
    """
    if tp == 1:
        return
    if spec.num_moe_layers:
        raise ModelError(
            f"the {module} is a mixture of experts, which tensor parallelism does not split alike everywhere: "
            "measure it at tp=1."
        )
    sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "intermediate": spec.intermediate}
    if spec.vocab:
        sizes["vocab"] = spec.vocab
    for name, size in sizes.items():
        if tp < 1 or size % tp:
            raise ModelError(
                f"tp={tp} does not divide the {module}'s {name} ({size}); use a divisor of all of "
                f"{', '.join(f'{key}={value}' for key, value in sizes.items())}."
            )


def _called_linears(layer: nn.Module, run: Callable[[], Any]) -> list[nn.Linear]:
    """The layer's matrices in the order in which they are called."""
    called: list[nn.Linear] = []
    with ExitStack() as stack:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(lambda one, _: called.append(one)).remove)
        with torch.no_grad():
            run()
    return list(dict.fromkeys(called))


def _narrow(linear: nn.Linear, tp: int, *, outputs: bool) -> None:
    with torch.no_grad():
        rows, columns = linear.weight.shape
        kept = linear.weight[: rows // tp] if outputs else linear.weight[:, : columns // tp]
        linear.weight = nn.Parameter(kept.clone())
        if outputs and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[: rows // tp].clone())
    linear.out_features, linear.in_features = linear.weight.shape


def shard_layers(layers: nn.ModuleList, spec: TransformerSpec, tp: int, run: Callable[[], Any], module: str) -> None:
    """Narrow all layers in place to one rank's share.

    Args:
        layers (`nn.ModuleList`): the stack.
        spec (`TransformerSpec`): its sizes.
        tp (`int`): the degree.
        run: runs the stack, to see the order of its matrices.
        module (`str`): its name for messages.

    Raises:
        ModelError: the degree does not divide, or the narrowed layers do not run.
    """
    check_degree(spec, module, tp)
    if tp == 1:
        return
    counts = {spec.heads, spec.kv_heads}
    narrowed = 0
    order = {id(linear): index for index, linear in enumerate(_called_linears(layers, run))}
    for layer in layers:
        for branch in layer.children():
            linears = [one for one in branch.modules() if isinstance(one, nn.Linear) and id(one) in order]
            if len(linears) < 2:
                continue
            narrowed += len(linears)
            linears.sort(key=lambda one: order[id(one)])
            for linear in linears[:-1]:
                _narrow(linear, tp, outputs=True)
            _narrow(linears[-1], tp, outputs=False)
            for part in branch.modules():
                for name, value in list(vars(part).items()):
                    if "heads" in name and isinstance(value, int) and value in counts and value % tp == 0:
                        setattr(part, name, value // tp)
    if narrowed < len(order):
        raise ModelError(
            f"{len(order) - narrowed} of the {len(order)} matrices in the {module}'s layers are not part of a chain "
            "(attention, MLP): how tensor parallelism would split them is not known. Measure at tp=1."
        )
    try:
        with torch.no_grad():
            run()
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the {module}'s layers do not run when split over tp={tp} ranks: "
            f"{str(error).splitlines()[0]}. Measure at tp=1; costs at other degrees are then scaled."
        ) from error


def shard_head(head: nn.Linear, tp: int) -> None:
    """Narrow the LM head in place to one rank's share of the vocabulary."""
    if tp > 1:
        _narrow(head, tp, outputs=True)
