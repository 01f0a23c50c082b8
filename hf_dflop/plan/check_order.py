"""Is an order runnable? Every action once, on one rank, after what it needs, and no rank waiting for ever.

In: an `Order`. Out: its actions in one list such that each stands after all that it waits for (a dry run without
seconds), or a `PlanError` that names the rank, the action and what it waits for.

Assumptions: a send never blocks its sender; a stage runs on one rank; a stage without any backward (a frozen encoder)
passes no gradient on, and neither do the stages before it.
"""

from collections import Counter
from typing import NamedTuple

from hf_dflop.errors import PlanError
from hf_dflop.plan.actions import Action, Kind, Order

__all__ = ["OrderFacts", "check_order", "dry_run"]

F, B, I, W = Kind  # noqa: E741  (as actions print)


class OrderFacts(NamedTuple):
    """What an order says about the pipeline."""

    stage_rank: tuple[int, ...]
    """Pipeline rank of each stage."""
    num_microbatches: int
    first_backward_stage: int
    """Stages before it have no backward."""


def check_order(order: Order) -> OrderFacts:
    """Check that the order holds each action exactly once, on one rank, with whole or split backwards.

    Raises:
        PlanError: an action is missing, there twice or on two ranks, or a stage has both kinds of backward.
    """
    actions = [action for rank in order for action in rank]
    if not actions:
        raise PlanError("the order has no action; a step has at least one forward.")
    twice = [action for action, count in Counter(actions).items() if count > 1]
    if twice:
        raise PlanError(f"the order runs {twice[0]} {actions.count(twice[0])} times; every action runs once.")
    num_stages = 1 + max(action.stage for action in actions)
    num_microbatches = 1 + max(action.microbatch for action in actions)
    ranks: list[set[int]] = [set() for _ in range(num_stages)]
    for number, rank in enumerate(order):
        for action in rank:
            ranks[action.stage].add(number)
    kinds: list[Counter[Kind]] = [Counter() for _ in range(num_stages)]
    for action in actions:
        kinds[action.stage][action.kind] += 1
    first = num_stages
    for stage in reversed(range(num_stages)):
        if len(ranks[stage]) != 1:
            raise PlanError(f"stage {stage} is on ranks {sorted(ranks[stage])}; a stage belongs to one rank.")
        found = kinds[stage]
        whole, split = found[B] == num_microbatches, found[I] == found[W] == num_microbatches
        none = not (found[B] or found[I] or found[W])
        if found[F] != num_microbatches or not (
            none or (whole and not found[I] + found[W]) or (split and not found[B])
        ):
            counts = ", ".join(f"{found[kind]} {kind.name.lower()}" for kind in Kind if found[kind])
            raise PlanError(
                f"stage {stage} has {counts} of {num_microbatches} microbatches; it needs as many forwards, and as "
                "many backwards (B), or backwards split in two (I and W), or none at all where nothing is trained."
            )
        if not none:
            if first != stage + 1:
                raise PlanError(f"stage {stage} has backwards but stage {stage + 1} has none to hand it a gradient.")
            first = stage
    return OrderFacts(tuple(next(iter(rank)) for rank in ranks), num_microbatches, first)


def needs(action: Action, num_stages: int, split: bool) -> list[Action]:
    """What must be done before `action`, apart from what stands before it on its rank.

    Args:
        action (`Action`): the action.
        num_stages (`int`): stages of the whole model.
        split (`bool`): whether the backward of the stage after it is split.
    """
    stage, kind, microbatch = action.stage, action.kind, action.microbatch
    if kind is F:
        return [Action(stage - 1, F, microbatch)] if stage else []
    if kind is W:
        return [Action(stage, I, microbatch)]
    after = [Action(stage + 1, I if split else B, microbatch)] if stage + 1 < num_stages else []
    return [Action(stage, F, microbatch), *after]


def dry_run(order: Order, facts: OrderFacts | None = None) -> list[Action]:
    """All actions of the order, each after everything that it waits for.

    Args:
        order (`Order`): pipeline rank -> actions.
        facts (`OrderFacts`, *optional*): what `check_order` returned for it; without it, it is called.

    Raises:
        PlanError: what `check_order` raises, or a deadlock: which rank waits for what.
    """
    facts = check_order(order) if facts is None else facts
    num_stages = len(facts.stage_rank)
    split = [False] * num_stages
    for actions in order:
        for action in actions:
            split[action.stage] |= action.kind is I
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}  # what is waited for -> the ranks that wait
    at = [0] * len(order)
    line: list[Action] = []

    def missing(action: Action) -> list[Action]:
        after = split[action.stage + 1] if action.stage + 1 < num_stages else False
        return [need for need in needs(action, num_stages, after) if need not in done]

    ready = list(reversed(range(len(order))))
    while ready:
        rank = ready.pop()
        while at[rank] < len(order[rank]):
            action = order[rank][at[rank]]
            if absent := missing(action):
                waiting.setdefault(absent[0], []).append(rank)
                break
            done.add(action)
            line.append(action)
            at[rank] += 1
            ready.extend(waiting.pop(action, ()))
    stuck = [order[rank][at[rank]] for rank in range(len(order)) if at[rank] < len(order[rank])]
    if stuck:
        told = "; ".join(
            f"rank {facts.stage_rank[action.stage]} waits in {action} for {missing(action)[0]}" for action in stuck[:4]
        )
        raise PlanError(f"the order ends in a deadlock: {told}. Put what is waited for before it.")
    return line
