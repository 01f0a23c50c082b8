"""GPipe and 1F1B: orders of a pipeline with one stage per rank.

Source: Huang et al., arXiv 1811.06965 (GPipe); Narayanan et al., arXiv 1806.03377 (1F1B).
"""

from hf_dflop.plan.actions import Action, Kind, Order

__all__ = ["gpipe_rank", "one_f_one_b_rank", "one_stage_per_rank"]

Line = list[Action]


def gpipe_rank(stage: int, num_stages: int, num_microbatches: int) -> Line:
    """All forwards, then all backwards."""
    forwards = [Action(stage, Kind.FORWARD, m) for m in range(num_microbatches)]
    return forwards + [Action(stage, Kind.BACKWARD, m) for m in range(num_microbatches)]


def one_f_one_b_rank(stage: int, num_stages: int, num_microbatches: int) -> Line:
    """As many forwards as there are stages after this one, then forward and backward in turn, then what is left."""
    ahead = min(num_microbatches, num_stages - stage - 1)
    line = [Action(stage, Kind.FORWARD, m) for m in range(ahead)]
    for m in range(num_microbatches):
        if ahead + m < num_microbatches:
            line.append(Action(stage, Kind.FORWARD, ahead + m))
        line.append(Action(stage, Kind.BACKWARD, m))
    return line


def one_stage_per_rank(ranks: tuple[int, ...], lines: list[Line]) -> Order:
    """Lines of stages -> order of ranks."""
    order: Order = [[] for _ in range(1 + max(ranks))]
    for rank, line in zip(ranks, lines, strict=True):
        order[rank] = line
    return order
