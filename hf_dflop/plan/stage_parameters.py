"""Numbers of parameters of each stage, for what is gathered and reduced. Biases and positions are not counted."""

from typing import NamedTuple

from hf_dflop.cost import ModelSpec, TransformerSpec
from hf_dflop.plan.plan import Plan

__all__ = ["StageParameters", "stage_parameters"]


class StageParameters(NamedTuple):
    """Parameters of a stage on one tensor-parallel rank."""

    all: float
    trained: float


def stage_parameters(plan: Plan, spec: ModelSpec) -> list[StageParameters]:
    """Parameters of each stage of a plan, the encoder's first."""
    found = []
    for stage, layers in enumerate(plan.vision.layers):
        encoder = layers * _layer(spec.vision) / plan.vision.tp
        last = stage == plan.vision.num_stages - 1
        connector = spec.connector.copies * sum(a * b for a, b in spec.connector.linears) if last else 0
        trained = encoder * ("vision" not in plan.frozen) + connector * ("connector" not in plan.frozen)
        found.append(StageParameters(encoder + connector, trained))
    for stage, layers in enumerate(plan.llm.layers):
        table = spec.llm.vocab * spec.llm.hidden
        tables = (stage == 0) + (stage == plan.llm.num_stages - 1)
        if spec.llm.tied_embeddings and plan.llm.num_stages == 1:
            tables = 1
        held = (layers * _layer(spec.llm) + tables * table) / plan.llm.tp
        found.append(StageParameters(held, held * ("llm" not in plan.frozen)))
    return found


def _layer(spec: TransformerSpec) -> float:
    attention = spec.hidden * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    matrices = 3 if spec.gated_mlp else 2
    experts = spec.num_experts * spec.expert_intermediate + spec.shared_intermediate
    share = spec.num_moe_layers / spec.num_layers
    return attention + matrices * spec.hidden * ((1 - share) * spec.intermediate + share * experts)
