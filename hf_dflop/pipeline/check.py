"""Start-up check: the LLM's stages, chained, against the whole LLM, on a small copy, forward and backward.

In: the model's class and config, the plan, the text inputs of a real microbatch, the format of the features. Out:
nothing, or `ModelError` with what differs. Everything is in one process, on the CPU, in float64, and takes about as
long as building a model of a few million weights.

The copy is that of `small_llm`. So masks, positions, scaled embeddings, features of several depths and the loss are
tried on what the model's own code makes of them. The encoder is one stage, run by its own code: nothing to try.

Assumption: what is exact at a small size is exact at the real one.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError
from hf_dflop.pipeline._compat import call_with_features
from hf_dflop.pipeline.kinds import Formats, enter
from hf_dflop.pipeline.small_llm import small_copy, small_features, small_inputs
from hf_dflop.pipeline.split import LlmPart, build_part
from hf_dflop.pipeline.structure import Structure, read_structure
from hf_dflop.plan.plan import Plan

__all__ = ["check_chain", "run_whole"]

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-9


def check_chain(
    model_class: type,
    config: Any,
    structure: Structure,
    plan: Plan,
    inputs: Mapping[str, Any],
    num_features: int,
    forms: Formats,
) -> None:
    """Try the plan's stages on a small copy of the LLM.

    Args:
        model_class (`type`), config (`PreTrainedConfig`): of the model.
        structure (`Structure`): of the model; only whether its embeddings are tied is used.
        plan (`Plan`): the layers of each stage.
        inputs (`Mapping`): text inputs of one microbatch; without labels, tokens are their own labels.
        num_features (`int`), forms (`Mapping`): rows of features of the microbatch, their format by kind.

    Raises:
        ModelError: loss or gradients of the chained stages are not those of the whole model.
    """
    if plan.llm.num_stages == 1 and not forms:
        return
    try:
        small, ids = small_copy(model_class, config, structure.tied)
        text = small_inputs(inputs, ids)
        small_forms, features = small_features(small, forms, num_features)
        with torch.random.fork_rng([]):
            whole = run_whole(small, text, features, small_forms)
    except Exception as error:
        logger.warning(
            "the stages could not be tried on a small copy of %s (%s: %s); the pipeline runs unchecked.",
            model_class.__name__,
            type(error).__name__,
            error,
        )
        return
    try:
        chained = _chained(small, plan, text, features, small_forms)
    except Exception as error:
        raise ModelError(
            f"{model_class.__name__} cannot be run in the stages {plan.llm.layers}: {type(error).__name__}: {error}"
        ) from error
    _compare(model_class.__name__, plan, whole, chained)


Found = tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]
"""Gradients, the loss divided by one, the loss divided by two: there the share of the routers' balancing loss, too,
which the model divides by nothing."""


def _grads(model: nn.Module, features: torch.Tensor | None) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if features is not None and features.grad is not None:
        grads["image features"] = features.grad
    return grads


def run_whole(model: Any, text: Mapping[str, Any], features: torch.Tensor | None, forms: Formats) -> Found:
    """One process's forward and backward of the copy; what is in `.grad` before is overwritten, and cleared."""
    losses = []
    for divisor in (2.0, 1.0):
        model.zero_grad()
        given = {"use_cache": False, **text}
        leaf = None if features is None else features.clone().requires_grad_()
        if leaf is not None and forms:
            given["mm_encoder_outputs"] = enter(leaf, forms, model.base_model, text)
        output = call_with_features(
            model, model.base_model, **given, num_items_in_batch=torch.tensor(divisor), return_dict=True
        )
        aux = getattr(output, "aux_loss", None)
        balance = torch.zeros(())
        if isinstance(aux, torch.Tensor) and aux.requires_grad:
            (factor,) = torch.autograd.grad(output.loss, aux, retain_graph=True, allow_unused=True)
            balance = balance if factor is None else factor * aux.detach()
        output.loss.backward()
        losses.append(output.loss.detach() - (balance / 2 if divisor == 2 else 0))
    found = _grads(model, leaf), losses[1], losses[0]
    model.zero_grad()
    return found


def _chained(model: Any, plan: Plan, text: Mapping[str, Any], features: torch.Tensor | None, forms: Formats) -> Found:
    structure = read_structure(model)
    leaf = None if features is None else features.clone().requires_grad_()
    received, edges = leaf, []
    for stage in range(plan.llm.num_stages):
        part = build_part(model, structure, plan, plan.vision.num_stages + stage)
        assert isinstance(part, LlmPart)
        output = part(text, received, forms, torch.tensor(1.0))
        output = output.loss if part.last else output
        edges.append((output, received))
        received = output.detach().requires_grad_()
    loss, gradient = edges[-1][0].detach(), None
    for output, received in reversed(edges):
        torch.autograd.backward(output, gradient)
        gradient = None if received is None else received.grad
    return _grads(model, leaf), loss, loss / 2


def _compare(name: str, plan: Plan, whole: Found, chained: Found) -> None:
    expected, loss, half = whole
    found, chained_loss, _ = chained
    told = f"{name} is not exact in the stages {plan.llm.layers}"
    if abs(float(loss - 2 * half)) > _TOLERANCE * abs(float(loss)):
        raise ModelError(
            f"the loss of {name} is not a sum over label tokens divided by num_items_in_batch ({float(loss):.6g} for "
            f"one, {float(half):.6g} for two): microbatches would not add up to the step's loss."
        )
    if abs(float(loss - chained_loss)) > _TOLERANCE * abs(float(loss)):
        raise ModelError(
            f"{told}: its loss on a small copy is {float(loss):.9g} whole and {float(chained_loss):.9g} in stages. A "
            "later stage needs what only an earlier one has (features put into more layers than the first stage "
            "holds): give the first stage more layers, or use fewer stages."
        )
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in expected.items():
        other = found.get(key)
        if other is None or float((grad - other).abs().max()) > _TOLERANCE * largest:
            raise ModelError(f"{told}: the gradient of {key} on a small copy is not that of the whole model.")
