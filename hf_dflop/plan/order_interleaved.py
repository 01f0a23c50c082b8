"""Interleaved 1F1B and zero bubble: several stages per rank, dealt round: stage s on rank s mod p.

Source: Narayanan et al., arXiv 2104.04473 (interleaved); Qi et al., arXiv 2401.10241 (zero bubble, ZB-H1, extended to
several stages per rank). Microbatches go in rounds of about p; every rank runs a round of one stage before the next
stage. Their number need not be a multiple of p, but of max(1, number // p).
"""

from hf_dflop.plan.actions import Action, Kind

__all__ = ["interleaved_rank", "rounds"]


def rounds(num_ranks: int, num_microbatches: int) -> int | None:
    """Microbatches of a round; None where they do not divide into rounds."""
    number = max(1, num_microbatches // num_ranks)
    return num_microbatches // number if num_microbatches % number == 0 else None


def interleaved_rank(
    rank: int, num_ranks: int, num_chunks: int, num_microbatches: int, round_size: int, *, split: bool
) -> list[Action]:
    """Actions of one rank.

    Args:
        rank (`int`): the rank.
        num_ranks (`int`), num_chunks (`int`): pipeline ranks, and stages of each.
        num_microbatches (`int`), round_size (`int`): as `rounds` gives it.
        split (`bool`): backwards are split, and those of the weights put off to fill the bubble (zero bubble).
    """
    total = num_chunks * num_microbatches
    ahead = (num_chunks - 1) * round_size + (1 if split else 2) * (num_ranks - 1 - rank)
    ahead = min(ahead, total)
    next_of: dict[tuple[Kind, int], int] = {}

    def take(kind: Kind, chunk: int) -> Action:
        stage = chunk * num_ranks + rank
        microbatch = next_of.get((kind, stage), 0)
        next_of[kind, stage] = microbatch + 1
        return Action(stage, kind, microbatch)

    def backward_chunk(step: int) -> int:
        return num_chunks - 1 - (step // round_size) % num_chunks

    line = []
    put_off = rank if split else 0  # weight backwards that wait
    for step in range(total + ahead):
        if step < total:
            line.append(take(Kind.FORWARD, (step // round_size) % num_chunks))
        if step < ahead:
            continue
        back = step - ahead
        line.append(take(Kind.BACKWARD_INPUT if split else Kind.BACKWARD, backward_chunk(back)))
        if split and back >= put_off:
            line.append(take(Kind.BACKWARD_WEIGHT, backward_chunk(back - put_off)))
    if split:
        for back in range(max(0, total - put_off), total):
            line.append(take(Kind.BACKWARD_WEIGHT, backward_chunk(back)))
    return line
