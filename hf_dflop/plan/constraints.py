"""What a user rules out: `vision.tp<=2`, `llm.pp==4`, `num_microbatches>=8`, `schedule==1f1b`, `no-fsdp`.

In: such texts. Out: a `Constraints`, whose `rejects` tells of a `Plan` which of them it breaks.
"""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import PlanError
from hf_dflop.plan.plan import SCHEDULES, Plan
from hf_dflop.plan.space import PLACED, LayoutTable

__all__ = ["Constraints"]

_REPLICATED = PLACED.index("replicated")
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


_COLUMNS: dict[str, Callable[[LayoutTable], Any]] = {
    **{f"{module}.{degree}": (lambda t, name=f"{short}_{degree}": t.column(name))  # type: ignore[misc]
       for module, short in (("vision", "v"), ("llm", "l")) for degree in ("tp", "pp", "dp")},
    "llm.ranks": lambda t: t.column("l_tp") * t.column("l_pp") * t.column("l_dp"),
}  # fmt: skip
"""Those of `_NUMBERS` that a layout alone decides."""
_LAYOUT_SWITCHES: dict[str, Callable[[LayoutTable], Any]] = {
    "no-ddp": lambda t: (t.columns[0] != _REPLICATED) | (t.column("shards") > 1),
    "no-fsdp": lambda t: (t.column("shards") == 1) | (t.column("shards") < t.column("l_dp")),
    "no-hsdp": lambda t: (t.column("shards") == 1) | (t.column("shards") == t.column("l_dp")),
    "no-colocated": lambda t: t.columns[0] != PLACED.index("colocated"),
    "no-disjoint": lambda t: ~t.is_disjoint,
    "no-tp": lambda t: (t.column("v_tp") == 1) & (t.column("l_tp") == 1),
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
        self._checks = [_parse("".join(text.split())) for text in texts]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for text, _, _ in self._checks)

    def rejects(self, plan: Plan) -> str | None:
        """The first constraint that the plan breaks; None if it keeps all."""
        return next((text for text, keeps, _ in self._checks if not keeps(plan)), None)

    def kept_by(self, table: LayoutTable) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
        """Layouts of which a plan may keep all constraints, `(num_layouts,)`; how many each constraint ruled out."""
        kept = np.ones(len(table), dtype=np.bool_)
        broken = {}
        for text, _, keeps in self._checks:
            if keeps is not None:
                here = keeps(table)
                broken[text] = int((kept & ~here).sum())
                kept &= here
        return kept, broken


_Check = tuple[str, Callable[[Plan], bool], Callable[[LayoutTable], Any] | None]


def _parse(text: str) -> _Check:
    if text in _SWITCHES:
        return text, _SWITCHES[text], _LAYOUT_SWITCHES.get(text)
    found = re.fullmatch(r"([a-z_.]+)(<=|>=|==|!=|<|>)(.+)", text)
    if found is not None:
        name, sign, value = found.groups()
        if name in _NUMBERS and value.isdigit():
            number, compare, read = int(value), _COMPARE[sign], _NUMBERS[name]
            column = _COLUMNS.get(name)
            of_layout = None if column is None else (lambda table: compare(column(table), number))
            return text, lambda plan: compare(read(plan), number), of_layout
        if name == "schedule" and sign in ("==", "!=") and value in SCHEDULES:
            wanted = sign == "=="
            return text, lambda plan: (plan.schedule == value) == wanted, None
    raise PlanError(
        f"{text!r} is not a constraint; write a comparison of {', '.join(_NUMBERS)} with a number, schedule==NAME "
        f"({', '.join(SCHEDULES)}), or {', '.join(_SWITCHES)}."
    )
