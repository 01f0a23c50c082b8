"""A lower bound on the objective of any assignment of a problem.

Inputs: a `Problem`. Output: ticks. Every objective is at least the busiest rank's sum, so the partition bound over
ranks holds for all of them; "stage" waits for encoders and LLMs apart, so their bounds add up; "pipeline" is a
partition over microbatches. With padding the LLM's total is at least that of the least padded grouping.
"""

import numpy as np

from hf_dflop.balance.bound import bound_ticks
from hf_dflop.balance.problem import Problem

__all__ = ["MAX_PADDING_CELLS", "step_bound_ticks"]

MAX_PADDING_CELLS = 2**18
"""The least-padding program runs up to this num_samples × num_groups (about 5 ms)."""


def step_bound_ticks(problem: Problem) -> float:
    """Ticks that the objective of no assignment can go below."""
    from hf_dflop.balance.padding import least_padding

    least_llm = int(problem.llm.sum())
    if problem.padded and problem.num_samples * problem.num_groups <= MAX_PADDING_CELLS:
        least_llm = int(least_padding(np.sort(problem.llm)[::-1].copy(), problem.num_groups)[1])
    both = np.stack([problem.vision, problem.llm], axis=1)
    if problem.objective == "pipeline":
        slow = np.tile(problem.inverse_speed, problem.num_slots)
        return max(bound_ticks(both, slow), least_llm / float((1.0 / slow).sum()))
    slow = problem.inverse_speed
    speed = float((1.0 / slow).sum())
    best = max(bound_ticks(both.sum(axis=1)[:, None], slow), (int(problem.vision.sum()) + least_llm) / speed)
    if problem.objective == "stage":
        vision = bound_ticks(both[:, :1], slow)
        best = max(best, vision + max(bound_ticks(both[:, 1:], slow), least_llm / speed))
    return best
