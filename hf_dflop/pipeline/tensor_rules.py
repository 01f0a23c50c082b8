"""Which modules of a stage are split over tensor-parallel ranks, and how: transformers' own plan of the model.

In: a model, its `tp_plan`, its structure, a plan. Out: names of parameters and modules → transformers' style, for the
modules whose degree is above 1. `model.tp_plan` is collected from the configs by transformers, or set by the user.

Embedding and head whose vocabulary the degree does not divide stay whole on every rank; in layers that is refused.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hf_dflop.errors import PlanError
from hf_dflop.pipeline.structure import Structure
from hf_dflop.plan.plan import Plan

__all__ = ["PARTIAL_STYLE", "llm_rules", "tensor_rules", "vision_rules"]

PARTIAL_STYLE = "replicated_with_grad_allreduce"
"""Of parameters that each rank holds whole and uses for its own share of the heads: their gradients are summed."""
_REMEDY = (
    'Plan with {part}.tp=1 (-c "{part}.tp==1"), or set model.tp_plan to rules for it and build the pipeline with '
    "PipelineModel.from_model."
)


def tensor_rules(model: Any, tp_plan: Mapping[str, str], structure: Structure, plan: Plan) -> dict[str, str]:
    """The rules of the modules with a degree above 1; parameters come before the module that holds them.

    Raises:
        PlanError: a module has no tensor-parallel plan, or the degree does not fit it.
    """
    rules: dict[str, str] = {}
    if plan.vision.tp > 1:
        rules |= vision_rules(model, tp_plan, structure, plan.vision.tp)
    if plan.llm.tp > 1:
        rules |= llm_rules(model, tp_plan, structure, plan.llm.tp)
    return rules


def _expand(model: nn.Module, generic: Mapping[str, str], inside: Callable[[str], bool]) -> dict[str, str]:
    """Rules with `*` for numbers → one for each parameter and module whose name is `inside`."""
    rules: dict[str, str] = {}
    for name, module in model.named_modules():
        if not inside(name):
            continue
        own = generic.get(_starred(name))
        for key, parameter in module._parameters.items():
            style = generic.get(_starred(f"{name}.{key}"), own)
            if parameter is not None and style is not None:
                rules[f"{name}.{key}"] = style
        if own is not None:
            rules[name] = own
    return rules


def _starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _under(name: str, parts: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def vision_rules(model: Any, tp_plan: Mapping[str, str], structure: Structure, degree: int) -> dict[str, str]:
    """The rules of the encoder and connector; raises `PlanError` as `tensor_rules`."""
    rules = _expand(model, tp_plan, lambda name: _under(name, structure.encoder))
    if not rules:
        named = structure.tower or " and ".join(structure.encoder)
        kind = type(model.get_submodule(structure.tower or structure.encoder[0])).__name__
        raise PlanError(
            f"vision.tp is {degree}, but {named} ({kind}) has no tensor-parallel plan (base_model_tp_plan of its "
            f"config). {_REMEDY.format(part='vision')}"
        )
    _check_modules(model, rules)
    return rules


def llm_rules(model: Any, tp_plan: Mapping[str, str], structure: Structure, degree: int) -> dict[str, str]:
    """The rules of decoder and head; raises `PlanError` as `tensor_rules`."""
    decoder = model.get_submodule(structure.decoder)
    generic = dict(tp_plan)
    generic.setdefault(_starred(structure.embedding), "embedding_rowwise")
    rules = _expand(model, generic, lambda name: _under(name, (structure.decoder, *structure.head)))
    for index in range(structure.num_layers):
        if not any(name.startswith(f"{structure.layers}.{index}.") for name in rules):
            raise PlanError(
                f"llm.tp is {degree}, but {structure.layers}.{index} of {type(decoder).__name__} has no "
                f"tensor-parallel plan (base_model_tp_plan of its config). {_REMEDY.format(part='llm')}"
            )
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    for name, number in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", getattr(text, "num_key_value_heads", None) or heads),
    ):
        if number % degree:
            raise PlanError(f"llm.tp is {degree}, which does not divide the {number} {name} of the LLM: use another.")
    _check_modules(model, rules)
    names = {id(module): name for name, module in model.named_modules()}
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    styles = [rules.get(names[id(module)], "") for module in ends]
    alike = styles[0] == "embedding_rowwise" and styles[-1].startswith("colwise")
    if any(module.weight.shape[0] % degree for module in ends) or (structure.tied and not alike):
        whole = tuple(names[id(module)] for module in ends)
        rules = {name: style for name, style in rules.items() if not _under(name, whole)}
    return rules


def _check_modules(model: Any, rules: dict[str, str]) -> None:
    modules = dict(model.named_modules())
    for name, style in rules.items():
        module = modules.get(name) if style.startswith(("colwise", "rowwise")) else None
        if module is not None and not any(f"{name}.{key}" in rules for key in module._parameters):
            raise PlanError(
                f"the tensor-parallel plan splits {name}, which is a {type(module).__name__} without a weight of its "
                "own (an adapter?): use tp=1."
            )
