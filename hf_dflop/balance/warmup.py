"""Compile ahead of the first step what assigning needs: numba compiles at the first call, for seconds."""

import itertools

import numpy as np

from hf_dflop.balance.assign import assign

__all__ = ["warm_up"]

_LENGTHS = ((3, 3, 3, 2, 2), (3, 3, 3, 2, 2, 2, 2, 2, 2, 2))
"""Samples of two ranks with one and with two microbatches. With these seconds in the LLM alone, or turned round in the
encoder too, no grouping reaches the lower bound, so that the search runs."""


def warm_up(*, objective: str, padded: bool) -> None:
    """Assign a few small samples, so that no later `assign` with this objective and padding compiles anything.

    Args:
        objective (`str`): as in [`assign`].
        padded (`bool`): as in [`assign`].
    """
    for num_slots, lengths in enumerate(_LENGTHS, start=1):
        stock = np.array_split(np.arange(len(lengths)), 2 * num_slots)
        nothing = (0,) * len(lengths)
        for vision_s, cap in itertools.product((nothing, lengths[::-1]), (None, 100)):
            assign(
                vision_s,
                lengths,
                num_ranks=2,
                num_slots=num_slots,
                objective=objective,
                padded=padded,
                baseline=[stock[:num_slots], stock[num_slots:]],
                tokens=lengths,
                max_tokens=cap,
                patches=lengths,
                max_patches=cap,
            )
