"""Process groups of a plan.

In: the members of each group. Out: the group of this rank. Every rank makes every group, in the same order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["new_group"]


def new_group(members: Iterable[Sequence[int]]) -> Any | None:
    """Make a group of each list of ranks; returns that of this rank, `None` if it is in none or alone."""
    mine = None
    for ranks in members:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                mine = group
    return mine
