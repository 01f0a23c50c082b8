"""Start-up check of an encoder in several stages: chained against whole, forward and backward, on a small copy.

In: the model's class and config, the plan, the encoder's inputs of a real microbatch. Out: nothing, or `ModelError`
with what differs. In one process, on the CPU, in float64.

The copy has the real class, layers, kinds of layers, choice of features and pixels; the hidden size is small. What a
later stage would need from an earlier one beside its hidden states (features taken at a depth that it does not see)
shows as a difference, so it is refused and not silently wrong.

Assumption: what is exact at a small size is exact at the real one. A copy that cannot be built or run is refused:
nothing else would tell.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from hf_dflop.errors import ModelError
from hf_dflop.pipeline.encoder import VisionPart
from hf_dflop.pipeline.features import read_format
from hf_dflop.pipeline.kinds import join, kinds_of, run_encoder
from hf_dflop.pipeline.small_llm import to_double
from hf_dflop.pipeline.split import build_part, read_cut
from hf_dflop.pipeline.states import packed_size
from hf_dflop.plan.plan import ModulePlan, Plan

__all__ = ["check_encoder", "compare_encoder", "small_encoder"]

_TOLERANCE = 1e-9
_HEADS, _HEAD_SIZE = 2, 16
_HIDDEN = _HEADS * _HEAD_SIZE
_SIZES = {
    **dict.fromkeys(("hidden_size", "embed_dim"), _HIDDEN),
    **dict.fromkeys(("num_heads", "num_attention_heads"), _HEADS),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 2 * _HIDDEN),
    "head_dim": _HEAD_SIZE,
}


def check_encoder(model_class: Any, config: Any, plan: Plan, inputs: Mapping[str, Any]) -> None:
    """Try the encoder's stages of a plan on a small copy of the model.

    Raises:
        ModelError: features or gradients of the chained stages are not those of the whole encoder, or that cannot be
            tried.
    """
    name = model_class.__name__
    try:
        small = small_encoder(model_class, config)
        given = {key: to_double(value) for key, value in inputs.items()}
        stages = Plan(vision=ModulePlan(layers=plan.vision.layers), llm=ModulePlan(layers=(1,)), num_microbatches=1)
        compare_encoder(small, stages, given)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the encoder of {name} could not be tried in {plan.vision.num_stages} stages on a small copy "
            f"({type(error).__name__}: {error}): run it as one stage, or pass check=False if you know it to be exact."
        ) from error


def compare_encoder(model: Any, plan: Plan, inputs: Mapping[str, Any]) -> None:
    """The encoder of `model` in the stages of a plan against the whole, on these inputs; gradients are overwritten.

    Raises:
        ModelError: features, their gradients, or shapes between stages differ.
    """
    name = type(model).__name__
    structure = read_cut(model, plan)
    assert structure.stack is not None
    body, kinds = model.get_submodule(structure.body), kinds_of(inputs) or ("image",)
    model.zero_grad()
    outputs = {kind: run_encoder(body, kind, inputs, structure.keys) for kind in kinds}
    forms = {kind: read_format(output) for kind, output in outputs.items()}
    whole = join(outputs, forms, body, inputs)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(whole.shape, generator=generator, dtype=torch.float64).to(whole.dtype)
    whole.backward(cotangent)
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    of = " and ".join(f"{kind}s" for kind in kinds)
    told = f"the encoder of {name} is not exact in the stages {plan.vision.layers}, on {of}"
    remedy = (
        "A later stage needs what only an earlier one has, such as features taken at a depth before its layers: give "
        "the last stage those layers, or run the encoder as one stage."
    )
    edges: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    received = None
    for stage in range(plan.vision.num_stages):
        part = build_part(model, structure, plan, stage)
        assert isinstance(part, VisionPart)
        shapes = None if received is None else part.incoming(inputs)
        if received is not None and shapes is not None and packed_size(shapes) != tuple(received.shape):
            raise ModelError(f"{told}: hidden states change their shape between layers. Run it as one stage.")
        try:
            edges.append((part(inputs, received, forms, shapes), received))
        except Exception as error:
            raise ModelError(f"{told}: {type(error).__name__}: {error}. {remedy}") from error
        received = edges[-1][0].detach().requires_grad_()
    found = edges[-1][0]
    if found.shape != whole.shape or not _same(found, whole, float(whole.detach().abs().max())):
        raise ModelError(f"{told}: its features on a small copy differ from those of the whole. {remedy}")
    gradient: torch.Tensor | None = cotangent
    for output, entry in reversed(edges):
        torch.autograd.backward(output, gradient)
        gradient = None if entry is None else entry.grad
    largest = max(float(grad.abs().max()) for grad in expected.values())
    grads = dict(model.named_parameters())
    for key, grad in expected.items():
        other = grads[key].grad
        if other is None or not _same(other, grad, largest):
            raise ModelError(f"{told}: the gradient of {key} on a small copy is not that of the whole. {remedy}")


def _same(found: torch.Tensor, expected: torch.Tensor, scale: float) -> bool:
    return float((found - expected).detach().abs().max()) <= _TOLERANCE * scale


def small_encoder(model_class: Any, config: Any, *, degree: int = 1) -> Any:
    """A small copy of the model, whose LLM is a stub, the same in every process; with heads for `degree`
    tensor-parallel ranks."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    _resize(text, degree)
    text.vocab_size, text.num_hidden_layers = 512, 1
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = _HEADS * degree
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    vision = small.vision_config
    _resize(vision, degree)
    for key in ("out_hidden_size", "projection_dim"):
        if hasattr(vision, key):
            setattr(vision, key, _HIDDEN * degree)
    for key in ("projection_dim", "hidden_size"):
        if isinstance(vars(small).get(key), int):
            setattr(small, key, _HIDDEN * degree)
    if "flash" in (small._attn_implementation or ""):
        small._attn_implementation = "sdpa"  # on the CPU; the masks mean the same
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        built = model_class(small).double().eval()
        for parameter in built.parameters():
            if parameter.ndim > 1:
                with torch.no_grad():
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return built


def _resize(config: Any, degree: int) -> None:
    for key, size in _SIZES.items():
        if isinstance(vars(config).get(key), int):
            setattr(config, key, size if key == "head_dim" else size * degree)
