"""Dummy images as samples of the step: they count in caps and in cost like any other row.

A collator with `dummy_image=True` gives every microbatch without an image one more row. Where a step has fewer images
than microbatches, its stock grouping tells how many such rows there are at most; they join the step as samples with an
image, are grouped with the others (one image at least in every microbatch), and are taken out again.

In: the arguments of `assign`. Out: the same with dummies, and an assignment without them.

Assumptions: all dummies are alike. A grouping may need fewer of them than the stock one; then its cost is estimated a
little too high.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_dflop.balance import Assignment, assign
from hf_dflop.errors import BalanceError

__all__ = ["Dummy", "assign_filled", "with_dummies", "without_dummies"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dummy:
    """What the row that the collator adds costs."""

    vision_s: float
    llm_s: float
    tokens: int
    patches: int


def assign_filled(arguments: dict[str, Any], dummy: Dummy | None) -> Assignment | None:
    """`assign` with dummies counted; `None` where the step needs none, or the caps leave no room for them."""
    filled = None if dummy is None else with_dummies(arguments, dummy)
    if filled is None:
        return None
    try:
        return without_dummies(assign(**filled), arguments["vision_s"].size)
    except BalanceError:
        return None


def with_dummies(arguments: dict[str, Any], dummy: Dummy) -> dict[str, Any] | None:
    """The keyword arguments of `assign` with a dummy for every bare stock microbatch; `None`: images are enough."""
    has_image, baseline = arguments["spread"], arguments["baseline"]
    num_groups = arguments["num_ranks"] * arguments["num_slots"]
    if int(has_image.sum()) >= num_groups:
        return None
    number = has_image.size
    grown: list[list[list[int]]] = []
    for slots in baseline:
        grown.append([])
        for group in slots:
            bare = not has_image[list(group)].any()
            grown[-1].append([*group, number] if bare else list(group))
            number += int(bare)
    added = number - has_image.size
    return {
        **arguments,
        "baseline": grown,
        "spread": np.append(has_image, np.ones(added, dtype=bool)),
        **{
            name: np.append(arguments[name], np.full(added, getattr(dummy, name)))
            for name in ("vision_s", "llm_s", "tokens", "patches")
        },
    }


def without_dummies(assignment: Assignment, num_samples: int) -> Assignment | None:
    """The assignment of the samples alone; `None` if a microbatch had nothing but dummies."""
    groups = tuple(tuple(group[group < num_samples] for group in slots) for slots in assignment.groups)
    if any(not group.size for slots in groups for group in slots):
        return None
    return replace(assignment, groups=groups, is_spread=False)
