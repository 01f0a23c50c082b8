"""Start-up check of tensor parallelism: a small copy split over the ranks against the whole, forward and backward.

In: the model's class, config and tensor-parallel plan, inputs of a real microbatch, the group of the ranks, all of
which call it. Out: nothing, or `ModelError` with what differs. In float64, on the pipeline's device.

A plan that forgets a parameter whose gradient each rank has a part of, or splits what is used whole, runs without an
error in other places; here it shows as a difference.

Assumptions: what is exact at a small size, and in the first layers, is exact at the real one. A copy that cannot be
built or run is refused: nothing else would tell.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import DflopError, ModelError
from hf_dflop.pipeline.check import run_whole
from hf_dflop.pipeline.check_encoder import small_encoder
from hf_dflop.pipeline.features import flatten, read_format
from hf_dflop.pipeline.kinds import Formats, kinds_of, run_encoder
from hf_dflop.pipeline.shards import Shards
from hf_dflop.pipeline.small_llm import small_copy, small_features, small_inputs, to_double
from hf_dflop.pipeline.structure import read_structure
from hf_dflop.pipeline.tensor_rules import llm_rules, vision_rules

__all__ = ["check_tensor_encoder", "check_tensor_llm"]

_TOLERANCE = 1e-6
"""Parts of a model compute in float32 whatever its type, and a sum in another order can round the other way there."""
_MAX_LAYERS = 8

Run = Callable[[], torch.Tensor]
"""Forward and backward; returns what to compare beside the gradients."""


def check_tensor_llm(
    model_class: type,
    config: Any,
    tp_plan: Mapping[str, str],
    degree: int,
    group: Any,
    device: torch.device,
    inputs: Mapping[str, Any],
    num_features: int,
    forms: Formats,
    *,
    tied: bool,
) -> None:
    """Try the split LLM on a small copy.

    Args:
        model_class (`type`), config (`PreTrainedConfig`): of the model.
        tp_plan (`Mapping[str, str]`): its `tp_plan`.
        degree (`int`), group, device (`torch.device`): the ranks.
        inputs (`Mapping`): text inputs of one microbatch, the same on all of them.
        num_features (`int`), forms (`Mapping`): rows of features of the microbatch, their format by kind.
        tied (`bool`): its embeddings are.

    Raises:
        ModelError: loss or gradients are not those of the whole, or that cannot be tried.
    """

    def build() -> tuple[Any, dict[str, str], Run]:
        small, ids = small_copy(model_class, config, tied, degree=degree, max_layers=_MAX_LAYERS)
        text = {key: _to(value, device) for key, value in small_inputs(inputs, ids).items()}
        small_forms, features = small_features(small, forms, num_features)
        leaf = None if features is None else features.to(device)
        for name in [name for name, value in small.named_parameters() if value.is_meta]:
            owner, _, key = name.rpartition(".")
            small.get_submodule(owner)._parameters[key] = None  # the encoder's, which is not there

        def run() -> torch.Tensor:
            gradients, loss, _ = run_whole(small, text, leaf, small_forms)
            for name, parameter in small.named_parameters():
                parameter.grad = gradients.get(name)
            return torch.cat([loss.reshape(1), gradients.get("image features", loss).reshape(-1)])

        return small, llm_rules(small, tp_plan, read_structure(small), degree), run

    _try(f"the LLM of {model_class.__name__}", build, degree, group, device)


def check_tensor_encoder(
    model_class: type,
    config: Any,
    tp_plan: Mapping[str, str],
    degree: int,
    group: Any,
    device: torch.device,
    inputs: Mapping[str, Any],
) -> None:
    """The same for the encoder, with its inputs of one microbatch.

    Raises:
        ModelError: features or gradients are not those of the whole, or that cannot be tried.
    """

    def build() -> tuple[Any, dict[str, str], Run]:
        small = small_encoder(model_class, config, degree=degree)
        structure = read_structure(small)
        given = {key: _to(to_double(value), device) for key, value in inputs.items()}
        body = small.get_submodule(structure.body)

        def run() -> torch.Tensor:
            parts = []
            for kind in kinds_of(given) or ("image",):
                output = run_encoder(body, kind, given, structure.keys)
                parts.append(flatten(output, read_format(output)))
            features = torch.cat(parts)
            generator = torch.Generator().manual_seed(2)
            features.backward(torch.randn(features.shape, generator=generator, dtype=torch.float64).to(device))
            return features.detach()

        return small, vision_rules(small, tp_plan, structure, degree), run

    _try(f"the encoder of {model_class.__name__}", build, degree, group, device)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _try(
    name: str,
    build: Callable[[], tuple[nn.Module, dict[str, str], Run]],
    degree: int,
    group: Any,
    device: torch.device,
) -> None:
    told = f"{name} split over {degree} tensor-parallel ranks"
    try:
        small, rules, run = build()
        small.to(device)
        whole = run()
        expected = {key: p.grad for key, p in small.named_parameters() if p.grad is not None}
        small.zero_grad()
        shards = Shards(small, rules, group, device)
        found = run()
        shards.settle(list(small.named_parameters()))
    except DflopError:
        raise
    except Exception as error:
        raise ModelError(
            f"{told} could not be tried on a small copy ({type(error).__name__}: {error}): use tp=1, or pass "
            "check=False if you know it to be exact."
        ) from error
    if not _same(found, whole, float(whole.abs().max())):
        raise ModelError(f"{told} gives another output than whole, on a small copy: its tp_plan is wrong. Use tp=1.")
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for key, parameter in small.named_parameters():
        if key in expected:
            share = shards.share(key, expected[key])
            if parameter.grad is None or not _same(parameter.grad, share, largest):
                raise ModelError(
                    f"{told}: the gradient of {key} on a small copy is not that of the whole; its tp_plan is wrong. "
                    "Use tp=1."
                )


def _same(found: torch.Tensor, expected: torch.Tensor, scale: float) -> bool:
    return float((found - expected).abs().max()) <= _TOLERANCE * scale
