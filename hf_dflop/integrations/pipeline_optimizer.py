"""An optimizer of the whole model → one of a rank's share, the same object.

In: an optimizer built on the stock model, or something that builds one. Out: it, with the parameters that this rank
holds, in the groups and with the options (and the state, if there is any) that they had. A learning-rate scheduler on
it stays attached.

Assumption: the optimizer updates each parameter by itself, as all of torch.optim but LBFGS do; one that looks at the
parameters of all groups together (LBFGS, Prodigy) would see those of one rank alone.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import TrainerError
from hf_dflop.pipeline import PipelineModel

__all__ = ["check_by_number", "keep_share", "names_of"]


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> all names under which `model` has it."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def keep_share(optimizer: Any, names: Mapping[nn.Parameter, list[str]], pipe: PipelineModel) -> torch.optim.Optimizer:
    """The optimizer of this rank.

    Args:
        optimizer (`torch.optim.Optimizer` or `Callable`):
            Built on the model before it was cut (changed in place), or a class or function that makes one from an
            iterable of parameters.
        names (`Mapping`): [`names_of`] the model before it was cut.
        pipe ([`PipelineModel`]): this rank's share.

    Raises:
        TrainerError: it is neither, is wrapped already, has parameters of another model, or keeps parameters where
            they cannot be exchanged.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise TrainerError(
                f"optimizer is a {type(optimizer).__name__}; give a torch optimizer, its class, or a function that "
                "makes one from parameters."
            )
        made = optimizer(pipe.parameters())
        if not isinstance(made, torch.optim.Optimizer):
            raise TrainerError(f"optimizer(parameters) gave a {type(made).__name__}, not a torch optimizer.")
        _check_groups_only(made)
        return made
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise TrainerError(
            f"the optimizer is wrapped already ({type(optimizer).__name__}); give prepare the plain one, instead of "
            "passing it to accelerator.prepare."
        )
    _check_groups_only(optimizer)
    own = dict(pipe.named_parameters(remove_duplicate=False))
    stays: dict[nn.Parameter, nn.Parameter] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise TrainerError(
                    f"parameter {place} of the optimizer's group {number}, of shape {tuple(parameter.shape)}, is not "
                    "one of the model's: build the optimizer on the very model that is given to prepare."
                )
            found = next((own[name] for name in names[parameter] if name in own), None)
            if found is not None:
                stays[parameter] = found
    for group in optimizer.param_groups:
        kept = [place for place, parameter in enumerate(group["params"]) if parameter in stays]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][place] for place in kept]
        group["params"] = [stays[group["params"][place]] for place in kept]
    kept_names = {parameter: name for name, parameter in own.items()}
    state = {
        stays[parameter]: {key: _share(pipe, kept_names[stays[parameter]], value) for key, value in values.items()}
        for parameter, values in optimizer.state.items()
        if parameter in stays
    }
    optimizer.state.clear()
    optimizer.state.update(state)
    if state:
        optimizer.load_state_dict(optimizer.state_dict())  # moves the state to the parameters' device
    return optimizer


def check_by_number(optimizer: torch.optim.Optimizer, pipe: PipelineModel) -> None:
    """Where parameters are split over tensor-parallel ranks, try whether the optimizer moves a part of a matrix as it
    moves the whole.

    Raises:
        TrainerError: it does not (Adafactor, Muon: they look at rows and columns).
    """
    if pipe.shards is None:
        return
    device = pipe.wire.device
    with torch.random.fork_rng([]):
        start, grad = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for group in optimizer.param_groups:
        moved = []
        for rows in (slice(0, 64), slice(0, 32)):
            twin: Any = object.__new__(type(optimizer))
            tried = nn.Parameter(start[rows].clone())
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            vars(twin).update(vars(optimizer), state=defaultdict(dict))
            twin.param_groups = [{**options, "params": [tried], "lr": 0.1}]  # a schedule may begin with 0
            for scale in (1.0, -0.5):
                tried.grad = grad[rows] * scale
                type(optimizer).step(twin)
            moved.append(tried.detach()[:32])
        if not torch.allclose(*moved, rtol=1e-5, atol=1e-6):
            raise TrainerError(
                f"{type(optimizer).__name__} moves a part of a matrix in another way than the whole, and llm.tp or "
                "vision.tp gives each rank a part: use tp=1, or an optimizer that updates each number by itself, such "
                "as AdamW."
            )


def _share(pipe: PipelineModel, name: str, value: Any) -> Any:
    return pipe.share(name, value) if torch.is_tensor(value) else value


def _check_groups_only(optimizer: torch.optim.Optimizer) -> None:
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state") and _holds_parameters(value):
            raise TrainerError(
                f"{type(optimizer).__name__} keeps parameters in its attribute {name!r}, too: it looks at several "
                "parameters at once, and a rank holds a share of them. Use an optimizer that updates each parameter "
                "by itself, such as AdamW."
            )


def _holds_parameters(value: Any, depth: int = 3) -> bool:
    if isinstance(value, nn.Parameter):
        return True
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(_holds_parameters(part, depth - 1) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set)):
        return any(_holds_parameters(part, depth - 1) for part in value)
    return False
