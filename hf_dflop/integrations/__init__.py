"""Where hf_dflop meets Trainer and accelerate."""

from hf_dflop.integrations.callback import DflopCallback

__all__ = ["DflopCallback"]
