"""What a user rules out: `vision.tp<=2`, `llm.pp==4`, `num_microbatches>=8`, `schedule==1f1b`, `no-fsdp`.

In: such texts. Out: a `Constraints`, whose `rejects` tells of a `Plan` which of them it breaks.
"""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_dflop.errors import PlanError
from hf_dflop.plan.plan import SCHEDULES, Plan

__all__ = ["Constraints"]

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBERS: dict[str, Callable[[Plan], int]] = {
    "vision.tp": lambda plan: plan.vision.tp,
    "vision.pp": lambda plan: plan.vision.pp,
    "vision.dp": lambda plan: plan.vision.dp,
    "vision.ranks": lambda plan: len(plan.vision_ranks),
    "llm.tp": lambda plan: plan.llm.tp,
    "llm.pp": lambda plan: plan.llm.pp,
    "llm.dp": lambda plan: plan.llm.dp,
    "llm.ranks": lambda plan: plan.llm.num_ranks,
    "num_microbatches": lambda plan: plan.num_microbatches,
    "num_chunks": lambda plan: plan.llm.num_chunks,
}
_SWITCHES: dict[str, Callable[[Plan], bool]] = {
    "no-ddp": lambda plan: plan.placement != "replicated" or plan.fsdp_shards > 1,
    "no-fsdp": lambda plan: plan.fsdp_shards == 1 or plan.fsdp_shards < plan.llm.dp,
    "no-hsdp": lambda plan: plan.fsdp_shards in (1, plan.llm.dp),
    "no-colocated": lambda plan: plan.placement != "colocated",
    "no-disjoint": lambda plan: plan.placement != "disjoint",
    "no-tp": lambda plan: plan.vision.tp == plan.llm.tp == 1,
    "no-checkpointing": lambda plan: not (plan.vision.checkpointing or plan.llm.checkpointing),
}


class Constraints:
    """A user's constraints, parsed.

    Raises:
        PlanError: a text that is none; the message lists what there is.

    Example:
        >>> Constraints(["llm.tp <= 2", "no-fsdp"]).texts
        ('llm.tp<=2', 'no-fsdp')
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._checks: list[tuple[str, Callable[[Plan], bool]]] = []
        for text in texts:
            self._checks.append(_parse("".join(text.split())))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for text, _ in self._checks)

    def rejects(self, plan: Plan) -> str | None:
        """The first constraint that the plan breaks; None if it keeps all."""
        return next((text for text, keeps in self._checks if not keeps(plan)), None)


def _parse(text: str) -> tuple[str, Callable[[Plan], bool]]:
    if text in _SWITCHES:
        return text, _SWITCHES[text]
    found = re.fullmatch(r"([a-z_.]+)(<=|>=|==|!=|<|>)(.+)", text)
    if found is not None:
        name, sign, value = found.groups()
        if name in _NUMBERS and value.isdigit():
            number, compare, read = int(value), _COMPARE[sign], _NUMBERS[name]
            return text, lambda plan: compare(read(plan), number)
        if name == "schedule" and sign in ("==", "!=") and value in SCHEDULES:
            wanted = sign == "=="
            return text, lambda plan: (plan.schedule == value) == wanted
    raise PlanError(
        f"{text!r} is not a constraint; write a comparison of {', '.join(_NUMBERS)} with a number, schedule==NAME "
        f"({', '.join(SCHEDULES)}), or {', '.join(_SWITCHES)}."
    )
