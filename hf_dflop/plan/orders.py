"""Orders of a pipeline: which rank runs which stage of which microbatch after which.

In: the rank of each stage, the number of microbatches, and for "data-aware" their seconds. Out: an `Order`, checked
and free of deadlock. An order is data: `format_order` prints it, `parse_order` reads it.

The rank of each stage need not be s mod p. Neighbouring stages on one rank (an encoder on the first stage's rank) run
as one. After that, one stage per rank gives the textbook order, stages dealt round give the interleaved one, and
whatever else (an encoder before an LLM with several stages per rank) is scheduled by list scheduling: a rank that is
free takes the deepest backward that is ready, else the deepest forward that memory allows.

Assumptions: all replicas follow the same order. "1f1b", "interleaved" and "zero-bubble" do not look at seconds.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby

from hf_dflop.errors import PlanError
from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.check_order import dry_run
from hf_dflop.plan.order_1f1b import gpipe_rank, one_f_one_b_rank, one_stage_per_rank
from hf_dflop.plan.order_greedy import greedy_order
from hf_dflop.plan.order_interleaved import interleaved_rank, rounds

__all__ = ["ORDERS", "format_order", "make_order", "parse_order", "stage_ranks"]

Ranks = tuple[int, ...]


def gpipe(stage_rank: Ranks, num_microbatches: int) -> Order:
    """All forwards before the first backward; the most memory."""
    if len(set(stage_rank)) == len(stage_rank):
        size = len(stage_rank)
        return one_stage_per_rank(stage_rank, [gpipe_rank(s, size, num_microbatches) for s in range(size)])
    order: Order = [[] for _ in range(1 + max(stage_rank))]
    for stage, rank in enumerate(stage_rank):
        order[rank] += [Action(stage, Kind.FORWARD, m) for m in range(num_microbatches)]
    for stage, rank in reversed(list(enumerate(stage_rank))):
        order[rank] += [Action(stage, Kind.BACKWARD, m) for m in range(num_microbatches)]
    return order


def one_f_one_b(stage_rank: Ranks, num_microbatches: int) -> Order:
    """One forward, one backward in turn; at most num_stages - s microbatches in flight on stage s."""
    if len(set(stage_rank)) == len(stage_rank):
        size = len(stage_rank)
        return one_stage_per_rank(stage_rank, [one_f_one_b_rank(s, size, num_microbatches) for s in range(size)])
    return greedy_order(stage_rank, num_microbatches)


def interleaved(stage_rank: Ranks, num_microbatches: int) -> Order:
    """Several stages per rank, dealt round; with one stage per rank it is 1F1B."""
    return _dealt_round(stage_rank, num_microbatches, split=False) or one_f_one_b(stage_rank, num_microbatches)


def zero_bubble(stage_rank: Ranks, num_microbatches: int) -> Order:
    """Backwards of the weights are put off to when a rank would wait; memory as 1F1B."""
    found = _dealt_round(stage_rank, num_microbatches, split=True)
    return found or greedy_order(stage_rank, num_microbatches, split=True)


def data_aware(stage_rank: Ranks, num_microbatches: int) -> Order:
    """List scheduling with equal seconds; `make_order(..., forward_s=)` schedules with those of the microbatches."""
    return greedy_order(stage_rank, num_microbatches)


ORDERS: dict[str, Callable[[Ranks, int], Order]] = {
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
    "data-aware": data_aware,
    "gpipe": gpipe,
}
"""Orders by the name of the schedule; all but "gpipe" can be asked for in a plan."""


def _dealt_round(stage_rank: Ranks, num_microbatches: int, *, split: bool) -> Order | None:
    """The order of stages dealt round the ranks, in the order in which the ranks come; None for any other deal."""
    ranks = list(dict.fromkeys(stage_rank))
    num_chunks, rest = divmod(len(stage_rank), len(ranks))
    size = rounds(len(ranks), num_microbatches)
    if rest or size is None or tuple(ranks) * num_chunks != stage_rank or (num_chunks == 1 and not split):
        return None
    order: Order = [[] for _ in range(1 + max(ranks))]
    for place, rank in enumerate(ranks):
        order[rank] = interleaved_rank(place, len(ranks), num_chunks, num_microbatches, size, split=split)
    return order


def stage_ranks(
    num_llm_ranks: int,
    num_llm_stages: int,
    *,
    num_vision_ranks: int = 0,
    num_vision_stages: int | None = None,
    colocated: bool = False,
) -> Ranks:
    """Pipeline rank of each stage, the encoder's first.

    Args:
        num_llm_ranks (`int`), num_llm_stages (`int`): of the LLM; stage s on its rank s mod `num_llm_ranks`.
        num_vision_ranks (`int`), num_vision_stages (`int`): the same of the encoder, on ranks before the LLM's.
        colocated (`bool`): the encoder is one stage on the rank of the LLM's first.

    Example:
        >>> stage_ranks(2, 4, num_vision_ranks=1), stage_ranks(2, 2, colocated=True)
        ((0, 1, 2, 1, 2), (0, 0, 1))
    """
    llm = [stage % num_llm_ranks for stage in range(num_llm_stages)]
    if colocated:
        return (0, *llm)
    vision = [stage % num_vision_ranks for stage in range(num_vision_stages or num_vision_ranks)]
    return (*vision, *(num_vision_ranks + rank for rank in llm))


def make_order(
    schedule: str,
    *,
    stage_rank: Sequence[int],
    num_microbatches: int,
    first_backward_stage: int = 0,
    microbatches: Sequence[int] | None = None,
) -> Order:
    """The order of a step.

    Args:
        schedule (`str`): a name of `ORDERS`.
        stage_rank (`Sequence[int]`): pipeline rank of each stage, see `stage_ranks`.
        num_microbatches (`int`): microbatches of each replica.
        first_backward_stage (`int`): stages before it have no backward (a frozen encoder).
        microbatches (`Sequence[int]`, *optional*): the microbatches in the order in which they are run; 0, 1, ...

    Returns:
        `Order`: pipeline rank -> actions. "data-aware" schedules equal seconds here; `data_aware_order` real ones.

    Raises:
        PlanError: an unknown schedule, ranks that are not 0, 1, ..., or microbatches that are no permutation.

    Example:
        >>> print(format_order(make_order("1f1b", stage_rank=(0, 1), num_microbatches=2)))
        0F0 0F1 0B0 0B1
        1F0 1B0 1F1 1B1
    """
    if schedule not in ORDERS:
        raise PlanError(f"schedule is {schedule!r}; use one of {', '.join(ORDERS)}.")
    ranks = _checked_ranks(stage_rank)
    if isinstance(num_microbatches, bool) or not isinstance(num_microbatches, int) or num_microbatches < 1:
        raise PlanError(f"num_microbatches is {num_microbatches!r}; it must be a whole number >= 1.")
    if not 0 <= first_backward_stage <= len(ranks):
        raise PlanError(f"first_backward_stage is {first_backward_stage}; it must be in 0 .. {len(ranks)}.")
    order = _cached(schedule, ranks, num_microbatches, first_backward_stage)
    if microbatches is None:
        return [list(rank) for rank in order]
    wanted = [int(m) for m in microbatches]
    if sorted(wanted) != list(range(num_microbatches)):
        raise PlanError(f"microbatches is {wanted}; it must hold each of 0 .. {num_microbatches - 1} once.")
    return [[Action(a.stage, a.kind, wanted[a.microbatch]) for a in rank] for rank in order]


@lru_cache(maxsize=32)
def _cached(schedule: str, ranks: Ranks, num_microbatches: int, first: int) -> tuple[tuple[Action, ...], ...]:
    fused = [rank for rank, _ in groupby(ranks)]
    order = ORDERS[schedule](tuple(fused), num_microbatches)
    if first == 0 and len(fused) == len(ranks):
        return tuple(tuple(rank) for rank in order)
    stages: list[list[int]] = [[] for _ in fused]  # fused stage -> stages
    at = -1
    for stage, rank in enumerate(ranks):
        at += stage == 0 or rank != ranks[stage - 1]
        stages[at].append(stage)
    return tuple(
        tuple(
            Action(stage, action.kind, action.microbatch)
            for action in rank
            for stage in (stages[action.stage] if action.kind is Kind.FORWARD else reversed(stages[action.stage]))
            if action.kind is Kind.FORWARD or stage >= first
        )
        for rank in order
    )


def _checked_ranks(stage_rank: Sequence[int]) -> Ranks:
    ranks = tuple(int(rank) for rank in stage_rank)
    if not ranks or sorted(set(ranks)) != list(range(max(ranks) + 1)):
        raise PlanError(f"stage_rank is {list(stage_rank)}; it must give each rank 0, 1, ... at least one stage.")
    return ranks


def format_order(order: Order) -> str:
    """One line per pipeline rank, actions apart by a space."""
    return "\n".join(" ".join(map(str, rank)) for rank in order)


def parse_order(text: str) -> Order:
    """Inverse of `format_order`; checks the order.

    Raises:
        PlanError: an action is not one, or the order cannot be run.
    """
    order = [[Action.parse(word) for word in line.split()] for line in text.strip().splitlines()]
    dry_run(order)
    return order
