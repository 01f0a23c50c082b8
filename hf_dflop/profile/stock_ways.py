"""How the Trainer's own samplers deal samples: transformers' code is run, on lengths alone.

Input: the samples of some steps in drawn order. Output: for each step, the samples of each rank. Both samplers see
one number per sample, its LLM tokens.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["by_batch_rebalance", "by_length"]

Groups = list[npt.NDArray[np.int64]]


def by_length(
    drawn: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], num_ranks: int, seed: int
) -> list[Groups] | None:
    """`train_sampling_strategy="group_by_length"`: which samples meet changes, the number per rank does not.

    Args:
        drawn (`(num_steps, samples_per_step)` of int64): samples of each step.
        tokens (`(num_samples,)` of int64): length of each sample.
        num_ranks (`int`): data-parallel ranks.
        seed (`int`): seed of the sampler.

    Returns:
        `list` or `None`: samples by step and rank; `None` where this transformers has no such sampler.
    """
    try:
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices
    except ImportError:
        return None
    flat = drawn.reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    per_rank = drawn.shape[1] // num_ranks
    order = get_length_grouped_indices(tokens[flat].tolist(), per_rank, generator=generator)
    return [list(step) for step in flat[np.asarray(order)].reshape(len(drawn), num_ranks, per_rank)]


def by_batch_rebalance(
    drawn: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], num_ranks: int
) -> list[Groups] | None:
    """`train_sampling_strategy="batch_rebalance"`: a step's samples in groups of different size; see `by_length`."""
    try:
        from transformers.trainer_pt_utils import BatchRebalanceSampler
    except ImportError:
        return None
    steps = []
    for batch in drawn:
        lengths = tokens[batch].tolist()
        sampler = BatchRebalanceSampler(
            lengths, effective_batch_size=len(lengths), dp_size=num_ranks, grad_accum=1, shuffle=False
        )
        if not hasattr(sampler, "_assign"):  # it yields one rank's part, and would balance anew for each rank
            return None
        dealt = sampler._assign(list(range(len(lengths))), lengths)
        steps.append([batch[np.asarray(slots[0])] for slots in dealt])
    return steps
