"""What samples cost: structure of a model, FLOPs from shapes, seconds from FLOPs. No torch, no
transformers."""

from hf_dflop.cost.activations import PartMemory, activation_memory
from hf_dflop.cost.audio import AudioSpec
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
from hf_dflop.cost.memory import MemorySettings, MicrobatchCounts, StageLayers, StageMemory, stage_memory
from hf_dflop.cost.model import CostModel, Observation, Rates
from hf_dflop.cost.model_profile import ModelProfile
from hf_dflop.cost.online import OnlineFit, Refinement, refine
from hf_dflop.cost.parameters import parameter_counts
from hf_dflop.cost.part_seconds import PartCosts, PartSeconds
from hf_dflop.cost.parts import PARTS, part_states
from hf_dflop.cost.spec import ConnectorSpec, ModelSpec, TransformerSpec

__all__ = [
    "PARTS",
    "AudioSpec",
    "ConnectorSpec",
    "CostModel",
    "FitError",
    "MemorySettings",
    "MicrobatchCounts",
    "ModelProfile",
    "ModelSpec",
    "ModuleFlops",
    "Observation",
    "OnlineFit",
    "PartCosts",
    "PartMemory",
    "PartSeconds",
    "Rates",
    "Refinement",
    "StageLayers",
    "StageMemory",
    "Trainable",
    "TransformerSpec",
    "activation_memory",
    "forward_terms",
    "llm_flops",
    "llm_terms",
    "module_flops",
    "parameter_counts",
    "part_states",
    "refine",
    "stage_memory",
    "train_factors",
    "training_flops",
]
