"""Compose the microbatches of one optimizer step so that ranks finish together.

Inputs: seconds of each sample of the global batch, how many ranks and microbatches, where ranks meet (the
objective), whether the collator pads. Output: the samples of each rank's microbatches, never worse than the stock
grouping. A pure function of its arguments: every rank computes the same assignment, without communication.

Source: section "data-aware scheduling" of DFLOP (arXiv 2603.25120) balances every microbatch for a pipeline; here the
objective follows the sync points of the run, padding is priced, and the search ends by work and not by time.

Assumptions: encoders do not pad, so a microbatch's vision cost is the sum over its samples. Its LLM cost is the sum
when packed, and number of samples × largest when padded: the longest sample is the most expensive one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.assignment import Assignment, Groups
from hf_dflop.balance.nesting import flat_groups, groups_in_time, nested_groups
from hf_dflop.balance.problem import Problem, checked_problem
from hf_dflop.balance.seed import seed_state
from hf_dflop.balance.spread import spread_out
from hf_dflop.balance.step_bound import step_bound_ticks
from hf_dflop.balance.ticks import to_seconds
from hf_dflop.errors import BalanceError

__all__ = ["assign", "assign_flat"]

PROPOSALS_PER_SAMPLE = 300
MAX_PROPOSALS = 100_000
"""Changes tried at most: about 15 ms for 256 samples, on one core."""
GOOD_ENOUGH = 1.002
"""The search stops at an objective this close to the bound."""
MEAN_SHARE = 10
"""The score is objective + mean compute per rank ÷ MEAN_SHARE."""
HEAT = 2_500
"""First threshold of the search: a quarter of one sample's mean share of the score, in ten-thousandths of it."""


def assign(
    vision_s: Any,
    llm_s: Any,
    *,
    num_ranks: int,
    num_slots: int,
    objective: str,
    padded: bool,
    baseline: Sequence[Sequence[Any]] | None = None,
    tokens: Any = None,
    max_tokens: int | None = None,
    patches: Any = None,
    max_patches: int | None = None,
    spread: Any = None,
    rank_speeds: Any = None,
    oversize: str = "error",
    seed: int = 0,
    proposals: int | None = None,
) -> Assignment:
    """Group the samples of one step into `num_ranks` x `num_slots` microbatches.

    Args:
        vision_s (`npt.ArrayLike`): `(num_samples,)`, seconds of each sample in the vision encoder.
        llm_s (`npt.ArrayLike`): `(num_samples,)`, seconds of each sample alone in the LLM.
        num_ranks (`int`): data-parallel ranks, or replicas of a pipeline.
        num_slots (`int`): microbatches of each rank.
        objective (`str`):
            Where ranks meet: `"step"` (DDP with accumulation), `"slot"` (a sync in every microbatch), `"stage"`
            (FSDP, ZeRO-3) or `"pipeline"` (encoder and LLM on their own ranks).
        padded (`bool`): whether the collator pads to the longest sample of the microbatch.
        baseline (`Sequence[Sequence[npt.ArrayLike]]`, *optional*):
            The stock grouping, `baseline[rank][slot]` = positions. Kept as it is when nothing better is found, unless
            it exceeds a cap.
        tokens (`npt.ArrayLike`, *optional*): `(num_samples,)`, LLM tokens of each sample.
        max_tokens (`int`, *optional*):
            Cap per microbatch on the sum of tokens, or on number of samples × longest when padded. Never exceeded.
        patches (`npt.ArrayLike`, *optional*): `(num_samples,)`, patches of each sample.
        max_patches (`int`, *optional*): cap per microbatch on the sum of patches. Never exceeded.
        spread (`npt.ArrayLike`, *optional*):
            `(num_samples,)` booleans, such as "has an image": every microbatch gets at least one such sample, so that
            all ranks run the same modules. Left out of account where the step has fewer of them than microbatches,
            or where the caps leave no room for it; `Assignment.is_spread` tells.
        rank_speeds (`npt.ArrayLike`, *optional*):
            `(num_ranks,)` relative speeds > 0. Costs hold for the fastest rank; a slower one gets less work, so that
            all end together.
        oversize (`str`, *optional*, defaults to `"error"`):
            What becomes of a sample that is above a cap by itself: an error, or `"alone"`: it gets a microbatch of
            its own, which exceeds the cap by what the sample does.
        seed (`int`, *optional*, defaults to 0): seed of the search, such as the step's number.
        proposals (`int`, *optional*): changes that the search tries at most; by default it grows with the samples.

    Returns:
        `Assignment`: every sample in exactly one microbatch, no microbatch empty. Except with `"pipeline"`, heavy
        microbatches come first, so that running out of memory shows in the first steps.

    Raises:
        BalanceError: arrays that are not usable, too few samples, a baseline that is no partition of them, a sample
            above a cap, or caps that no assignment was found to satisfy.
        ValueError: an unknown objective or `oversize`.

    Example:
        Two ranks, one microbatch each, packed: 3 + 1 and 2 + 2 seconds.

        >>> result = assign([0, 0, 0, 0], [3, 2, 1, 2], num_ranks=2, num_slots=1, objective="step", padded=False)
        >>> result.predicted_s, [sorted(rank[0].tolist()) for rank in result.groups]
        (4.0, [[0, 2], [1, 3]])
    """
    problem = checked_problem(
        vision_s,
        llm_s,
        num_ranks=num_ranks,
        num_slots=num_slots,
        objective=objective,
        padded=padded,
        tokens=tokens,
        max_tokens=max_tokens,
        patches=patches,
        max_patches=max_patches,
        spread=spread,
        rank_speeds=rank_speeds,
        oversize=oversize,
    )
    bound = step_bound_ticks(problem)
    limit = min(PROPOSALS_PER_SAMPLE * problem.num_samples, MAX_PROPOSALS) if proposals is None else proposals
    stock = None if baseline is None else flat_groups(baseline, problem)
    problem, group = _best_group(problem, stock, bound, limit, seed)
    measured = _measure(problem, group)
    groups: Groups = nested_groups(problem, group)
    kept = False
    baseline_s = baseline_imbalance = float("nan")
    if baseline is not None and stock is not None:
        stock_measured = _measure(problem, stock)
        baseline_s = to_seconds(stock_measured.value, problem.bits)
        baseline_imbalance = _imbalance(problem, stock, stock_measured.value)
        kept = stock_measured.excess == 0 and stock_measured <= measured
        if kept:
            group, measured = stock, stock_measured
            groups = tuple(tuple(np.asarray(slot, dtype=np.int64) for slot in rank) for rank in baseline)
    if measured.excess:
        raise BalanceError(_no_room(problem))
    busy = _busy(problem, group)
    return Assignment(
        groups=groups,
        objective=objective,
        predicted_s=to_seconds(measured.value, problem.bits),
        baseline_s=baseline_s,
        bound_s=to_seconds(bound, problem.bits),
        rank_busy_s=to_seconds(busy, problem.bits),
        imbalance=_imbalance(problem, group, measured.value),
        baseline_imbalance=baseline_imbalance,
        is_baseline=kept,
        is_spread=None if spread is None else _is_spread(spread, group, problem.num_groups),
    )


def assign_flat(
    vision_s: Any,
    llm_s: Any,
    stock: npt.NDArray[np.int64],
    *,
    num_ranks: int,
    num_slots: int,
    objective: str,
    padded: bool,
    proposals: int,
    kicks: int | None = None,
) -> npt.NDArray[np.int64]:
    """`assign` without caps and without a report, for searches that compose thousands of steps.

    Args:
        vision_s, llm_s, num_ranks, num_slots, objective, padded, proposals: as in `assign`.
        stock: `(num_samples,)`, the stock grouping: slot × num_ranks + rank of each sample.
        kicks (`int`, *optional*): of the partition that it starts from, see `partition`; by default as `assign` does.

    Returns:
        `(num_samples,)`: the grouping that `assign` makes, numbered as `stock`.
    """
    problem = checked_problem(
        vision_s, llm_s, num_ranks=num_ranks, num_slots=num_slots, objective=objective, padded=padded, tokens=None,
        max_tokens=None, patches=None, max_patches=None, spread=None,
    )  # fmt: skip
    problem, group = _best_group(problem, stock, step_bound_ticks(problem), proposals, 0, kicks)
    if _measure(problem, stock) <= _measure(problem, group):
        return stock
    return groups_in_time(problem, group)


def _best_group(
    problem: Problem,
    stock: npt.NDArray[np.int64] | None,
    bound: float,
    limit: int,
    seed: int,
    kicks: int | None = None,
) -> tuple[Problem, npt.NDArray[np.int64]]:
    """The grouping found, and the problem that it solves: without what was to be spread, if the caps forbid it."""
    group = _solve(problem, stock, bound, limit, seed, kicks)
    if problem.is_spread is not None and _measure(problem, group).excess:  # the caps go first
        problem = replace(problem, is_spread=None)
        group = _solve(problem, stock, bound, limit, seed, kicks)
    return problem, group


def _is_spread(spread: Any, group: npt.NDArray[np.int64], num_groups: int) -> bool:
    return bool(np.bincount(group[np.asarray(spread)], minlength=num_groups).all())


class _Measure(NamedTuple):
    """What a grouping costs; of two, the smaller tuple is the better one."""

    excess: int
    """By how much caps are exceeded, summed over microbatches."""
    value: int
    """Objective, ticks."""
    total: int
    """Compute of all ranks, ticks."""


def _solve(
    problem: Problem,
    stock: npt.NDArray[np.int64] | None,
    bound: float,
    limit: int,
    seed: int,
    kicks: int | None,
) -> npt.NDArray[np.int64]:
    """The best grouping found; it exceeds the caps only if none was found that does not."""
    from hf_dflop.balance.search import search
    from hf_dflop.balance.starts import spread_slots, starts

    candidates = [*starts(problem, seed, kicks), *([] if stock is None else [stock])]
    candidates = [spread_out(problem, candidate) for candidate in candidates]
    weights, caps, padded_caps = problem.limits
    target = int(bound * GOOD_ENOUGH)
    group = min(candidates, key=lambda candidate: _score(problem, candidate))
    score = _score(problem, group)
    # climb from every start, then go on from the best with a threshold
    turns: list[tuple[npt.NDArray[np.int64] | None, int]] = [(start, 0) for start in candidates]
    turns.append((None, HEAT // problem.num_samples))
    for turn, (start, heat) in enumerate(turns):
        if problem.num_groups < 2 or (score[0] == 0 and score[2] <= target):
            break
        found = search(
            group if start is None else start,
            problem.num_groups,
            problem.slowness,
            problem.vision,
            problem.llm,
            weights,
            caps,
            padded_caps,
            problem.padded,
            problem.code,
            target,
            limit // len(turns),
            heat,
            MEAN_SHARE * problem.num_ranks,
            seed_state(seed, turn),
        )
        found_score = _score(problem, found)
        if found_score < score:
            group, score = found, found_score
    if problem.objective == "step" and not problem.padded and problem.num_slots > 1:
        rank = group % problem.num_ranks  # the objective does not see how a rank's samples are spread: memory does
        even = spread_out(problem, spread_slots(problem, rank))
        measured = _measure(problem, even)
        if not measured.excess and measured.value <= _measure(problem, group).value:
            group = even
    return group


def _score(problem: Problem, group: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    """(excess over caps, score of the search, objective): smaller is better."""
    excess, value, total = _measure(problem, group)
    return excess, MEAN_SHARE * problem.num_ranks * value + total, value


def _measure(problem: Problem, group: npt.NDArray[np.int64]) -> _Measure:
    from hf_dflop.balance.search import evaluate

    excess, value, total = evaluate(
        group,
        problem.num_groups,
        problem.slowness,
        problem.vision,
        problem.llm,
        *problem.limits,
        problem.padded,
        problem.code,
    )
    return _Measure(int(excess), int(value), int(total))


def _busy(problem: Problem, group: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Ticks that each rank computes, `(num_ranks,)`."""
    vision, llm = problem.group_costs(group)
    return (vision + llm).reshape(problem.num_slots, problem.num_ranks).sum(axis=0) * problem.inverse_speed


def _imbalance(problem: Problem, group: npt.NDArray[np.int64], value: int) -> float:
    if value == 0:
        return 0.0
    lanes = 2 * problem.num_slots * problem.num_ranks if problem.objective == "pipeline" else problem.num_ranks
    return 1.0 - float(_busy(problem, group).sum()) / (value * lanes)


def _no_room(problem: Problem) -> str:
    columns = [
        f"{name}: {int(problem.weights[:, k].sum())} in all (largest sample {int(problem.weights[:, k].max())}), "
        f"{problem.num_groups} microbatches x {int(problem.caps[k])} = {problem.num_groups * int(problem.caps[k])}"
        for k, name in enumerate(problem.cap_names)
    ]
    padding = " With padding a microbatch counts number of samples x longest." if problem.padded_caps.any() else ""
    return (
        f"no assignment of {problem.num_samples} samples to {problem.num_ranks} ranks x {problem.num_slots} "
        f"microbatches within the caps was found ({'; '.join(columns)}).{padding} Raise the cap or use more "
        "microbatches (accumulation steps) per step."
    )
