"""What samples cost: structure of a model, FLOPs from shapes, seconds from FLOPs. No torch, no
transformers."""

from hf_dflop.cost.fit import FitError
from hf_dflop.cost.flops import (
    ModuleFlops,
    Trainable,
    forward_terms,
    llm_flops,
    llm_terms,
    module_flops,
    train_factors,
    training_flops,
)
from hf_dflop.cost.model import CostModel, Observation, Rates
from hf_dflop.cost.online import OnlineFit, Refinement, refine
from hf_dflop.cost.spec import ConnectorSpec, ModelSpec, TransformerSpec

__all__ = [
    "ConnectorSpec",
    "CostModel",
    "FitError",
    "ModelSpec",
    "ModuleFlops",
    "Observation",
    "OnlineFit",
    "Rates",
    "Refinement",
    "Trainable",
    "TransformerSpec",
    "forward_terms",
    "llm_flops",
    "llm_terms",
    "module_flops",
    "refine",
    "train_factors",
    "training_flops",
]
