"""Which parts of a model each stage of a plan holds, and how many parameters that is."""

from functools import lru_cache
from typing import NamedTuple

from hf_dflop.cost import ModelSpec
from hf_dflop.cost.memory import StageLayers
from hf_dflop.cost.parameters import parameter_counts
from hf_dflop.cost.parts import MODULE_OF_PART
from hf_dflop.plan.padded_heads import padded_encoder
from hf_dflop.plan.plan import Plan

__all__ = ["StageParameters", "stage_parameters", "stage_parts"]


def stage_parts(plan: Plan) -> list[StageLayers]:
    """What each stage holds, the encoder's stages first."""
    vision, llm = plan.vision, plan.llm
    found = [
        StageLayers(
            vision_layers=0 if plan.cached_features else layers,
            vision_fixed=stage == 0 and not plan.cached_features,
            connector=stage == vision.num_stages - 1,
        )
        for stage, layers in enumerate(vision.layers)
    ]
    found += [
        StageLayers(llm_layers=layers, llm_fixed=stage == 0, llm_head=stage == llm.num_stages - 1)
        for stage, layers in enumerate(llm.layers)
    ]
    return found


class StageParameters(NamedTuple):
    """Parameters of a stage on one tensor-parallel rank."""

    all: float
    trained: float


@lru_cache(maxsize=256)
def _counts(spec: ModelSpec, tp: int) -> dict[str, float]:
    return dict(parameter_counts(spec, tp=tp))


def stage_parameters(plan: Plan, spec: ModelSpec) -> list[StageParameters]:
    """Parameters of each stage of a plan, the encoder's first."""
    counts = {
        "vision": _counts(padded_encoder(spec, plan.vision.tp), plan.vision.tp),
        "llm": _counts(spec, plan.llm.tp),
    }
    found = []
    for held in stage_parts(plan):
        copies = held.copies
        if spec.llm.tied_embeddings and held.llm_fixed and held.llm_head:
            copies = copies | {"llm_head": 0}
        number = {
            part: copies[part] * counts["vision" if module == "vision" else "llm"][part]
            for part, module in MODULE_OF_PART.items()
        }
        trained = sum(count for part, count in number.items() if MODULE_OF_PART[part] not in plan.frozen)
        found.append(StageParameters(float(sum(number.values())), float(trained)))
    return found
