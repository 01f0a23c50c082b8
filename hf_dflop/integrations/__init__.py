"""Where hf_dflop meets Trainer and accelerate."""

from hf_dflop.integrations.callback import DflopCallback
from hf_dflop.integrations.pipeline_loop import prepare
from hf_dflop.integrations.pipeline_trainer import DflopTrainer, PipelineTrainerMixin

__all__ = ["DflopCallback", "DflopTrainer", "PipelineTrainerMixin", "prepare"]
