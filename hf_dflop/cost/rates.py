"""FLOP rates, and the measured microbatches that they are fitted to.

Assumption: a term runs at one rate whatever its size.
"""

from dataclasses import dataclass

import numpy as np

from hf_dflop.cost.fit import RATE_TERMS
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = ["Observation", "Rates"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """FLOP/s of each term; what has no term of its own runs at the rate of its module's weights."""

    vision_linear: float
    """Encoder weights, patch embedding, connector."""
    vision_attention: float
    """Encoder attention scores."""
    llm_linear: float
    """LLM weights and the LM head."""
    llm_attention: float
    """LLM attention scores."""

    def __post_init__(self) -> None:
        for name in RATE_TERMS:
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ModelError(f"the rate {name} is {value} FLOP/s; it must be positive and finite.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One measured microbatch.

    Raises:
        ModelError: the seconds are not positive and finite, or there is no sample.
    """

    shapes: Shapes
    """Its samples, `num_samples` of them."""
    padded: bool
    """Rows were padded to the longest (True) or packed without padding (False)."""
    seconds: float
    """Forward and backward together."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.seconds) and self.seconds > 0):
            raise ModelError(f"an observation took {self.seconds} seconds; it must be positive. Drop it.")
        if len(self.shapes) == 0:
            raise ModelError("an observation has no samples; drop it.")
