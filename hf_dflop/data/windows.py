"""The steps of a window, giants paired, each dealt to ranks and slots as its stock step was.

In: the stock microbatches of consecutive steps, and seconds. Out: as many steps of the same form.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import pair_giants

__all__ = ["paired_steps"]


def paired_steps(
    steps: Sequence[Any], seconds: npt.NDArray[np.float64], num_ranks: int, *, first_index: int = 0
) -> list[Any]:
    """Pair giants across `steps`.

    Args:
        steps (`Sequence`): for each step, rank → slot → sample indices.
        seconds (`npt.NDArray[np.float64]`): of each sample, by index from `first_index` on.
        num_ranks (`int`): ranks that share a step.
        first_index (`int`, *optional*, defaults to 0): index of the first of `seconds`.

    Returns:
        `list`: the steps; as they are where ranks differ in their microbatches, or a sample comes twice (the end of an
        epoch), and might come twice in one step.
    """
    if any(len({len(slots) for slots in step}) > 1 for step in steps):
        return list(steps)
    members = [[index for slots in step for group in slots for index in group] for step in steps]
    indices = np.array(list(chain.from_iterable(members)), dtype=np.int64)
    if np.unique(indices).size != indices.size:
        return list(steps)
    paired = pair_giants(seconds[indices - first_index], [len(step) for step in members], num_ranks)
    dealt = []
    for step, positions in zip(steps, paired, strict=True):
        rest = iter(indices[positions].tolist())
        dealt.append([[[next(rest) for _ in group] for group in slots] for slots in step])
    return dealt
