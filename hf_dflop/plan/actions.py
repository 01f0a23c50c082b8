"""The alphabet of schedules: what one rank does, one action after the other.

An action prints as stage, kind, microbatch, as torch.distributed.pipelining writes it: `2F0` is the forward of
microbatch 0 on stage 2. A stage number counts through the whole model: the encoder's stages first. An *order* is one
list of actions per pipeline rank; the simulator times it, and the pipeline runs it.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from hf_dflop.errors import PlanError

__all__ = ["Action", "Kind", "Order"]


class Kind(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of inputs and weights together."""
    BACKWARD_INPUT = "I"
    """Gradient of the input alone, which the stage before waits for (zero bubble)."""
    BACKWARD_WEIGHT = "W"
    """Gradient of the weights alone, after the input's."""


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One computation of one microbatch on one stage.

    Example:
        >>> str(Action(2, Kind.FORWARD, 0)), Action.parse("1W13")
        ('2F0', Action(stage=1, kind=<Kind.BACKWARD_WEIGHT: 'W'>, microbatch=13))
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Inverse of `str`.

        Raises:
            PlanError: not an action.
        """
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", text.strip())
        if found is None:
            raise PlanError(f"{text!r} is not an action; write stage, one of F B I W, microbatch, such as 2F0.")
        return cls(int(found[1]), Kind(found[2]), int(found[3]))


Order = list[list[Action]]
"""pipeline rank -> its actions, first to last."""
