"""The best plan: best first, with bounds that hold.

In: a `Scorer`, layouts, constraints. Out: the plan of least expected seconds of each kind (DDP, FSDP, HSDP, colocated,
disjoint) and so of all, what was rejected and why.

Layouts are taken in the order of their bounds. A layout whose bound is not below the best score so far ends the
search of its kind: all later ones have higher bounds. A plan is scored batch by batch, and given up when its score
so far and the bounds of the other batches cannot be below the best. So nothing that could win is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.bound import Variant, layout_bounds
from hf_dflop.plan.candidates import SEARCHED_SCHEDULES, checkpointing_variants, draft_plans, make_candidate
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.space import Layout

__all__ = ["KINDS", "Candidate", "SearchResult", "kind_of", "search"]

KINDS: tuple[str, ...] = ("DDP", "FSDP", "HSDP", "colocated", "disjoint")
FloatArray = npt.NDArray[np.float64]
NEAR = 1.25
"""The best plan of a kind is found exactly where it is within this factor of the best of the kinds before it."""


def kind_of(layout: Layout) -> str:
    """The kind of a layout, one of `KINDS`."""
    if layout.placement != "replicated":
        return layout.placement
    return "DDP" if layout.shards == 1 else "FSDP" if layout.shards == layout.l_dp else "HSDP"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """A plan with its score."""

    plan: Plan
    seconds: FloatArray
    """`(num_batches,)` of a step with each batch."""

    @property
    def mean_s(self) -> float:
        return float(self.seconds.mean())


@dataclass(kw_only=True, slots=True)
class SearchResult:
    """What a search found, and what it left out."""

    best: dict[str, Candidate] = field(default_factory=dict)
    """The best plan of each kind that has one."""
    scored: list[Candidate] = field(default_factory=list)
    """Plans that were scored in full, best first."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> plans (and layouts) that it ruled out."""
    num_layouts: int = 0
    num_bounded: int = 0
    """Layouts whose bound alone ruled them out."""
    closest: tuple[float, Plan] | None = None
    """Of the plans that do not fit: needed ÷ available bytes of the one that is nearest, and that plan."""

    @property
    def winner(self) -> Candidate | None:
        """The plan of least mean seconds; of equals, the plainest kind."""
        found = [self.best[kind] for kind in KINDS if kind in self.best]
        return min(found, key=lambda one: one.mean_s) if found else None


def search(
    scorer: Scorer,
    found: Sequence[Layout],
    *,
    constraints: Constraints | None = None,
    schedules: Sequence[str] = SEARCHED_SCHEDULES,
    balance: bool = True,
    kinds: Sequence[str] = KINDS,
    every_kind: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the plan of least mean seconds.

    Args:
        scorer (`Scorer`): workload, cluster, memory rule.
        found (`Sequence[Layout]`): the layouts to choose from.
        constraints (`Constraints`, *optional*): what the user rules out.
        schedules (`Sequence[str]`): those to try.
        balance (`bool`): microbatches composed by cost, or as the stock sampler deals them.
        kinds (`Sequence[str]`): those to look at.
        every_kind (`bool`): find the best of each kind within `NEAR` of the best, and not only the best of all.
        progress (`Callable`, *optional*): called with (layouts done or ruled out, layouts).
    """
    result = SearchResult(num_layouts=len(found))
    rules = constraints or Constraints()
    done = 0
    overall = np.inf
    for kind in KINDS:
        of_kind = [layout for layout in found if kind_of(layout) == kind]
        if not of_kind or kind not in kinds:
            done += len(of_kind)
            continue
        of_kind = _roomy(scorer, of_kind, result)
        if not of_kind:
            continue
        bounds = _bounds(scorer, of_kind, schedules)
        means = bounds.mean(axis=1)
        best: Candidate | None = None
        limit = overall * (NEAR if every_kind else 1.0)
        order = np.argsort(means, kind="stable")
        for turn, place in enumerate(order):
            if means[place] >= limit:
                result.num_bounded += len(order) - turn
                break
            best = _best_of_layout(
                scorer, of_kind[place], bounds[place], limit, best, result, rules, schedules, balance
            )
            if best is not None:
                limit = min(limit, best.mean_s)
            if progress is not None:
                progress(done + turn + 1, len(found))
        done += len(of_kind)
        if best is not None:
            result.best[kind] = best
            overall = min(overall, best.mean_s)
    if progress is not None:
        progress(len(found), len(found))
    result.scored.sort(key=lambda one: one.mean_s)
    return result


def _roomy(scorer: Scorer, of_kind: Sequence[Layout], result: SearchResult) -> list[Layout]:
    """The layouts whose weights and optimizer state fit; the others fit with no microbatch at all."""
    found = []
    needs: dict[tuple[object, ...], tuple[float, Plan | None]] = {}
    for layout in of_kind:
        # on GPUs of one kind the replicas make no difference
        key = (layout.v_tp, layout.v_pp, layout.l_tp, layout.l_pp, layout.shards, *(layout if scorer.is_mixed else ()))
        if key not in needs:
            plan = make_candidate(scorer.workload, layout, "1f1b", 1, 1, (False, False))
            needs[key] = (scorer.static_need(plan) if plan is not None else 0.0, plan)
        need, plan = needs[key]
        if need <= 1:
            found.append(layout)
        else:
            assert plan is not None
            result.rejected["memory of weights and optimizer state"] += 1
            _note_closest(result, need, plan)
    return found


def _note_closest(result: SearchResult, need: float, plan: Plan) -> None:
    if result.closest is None or need < result.closest[0]:
        result.closest = (need, plan)


def _bounds(scorer: Scorer, of_kind: Sequence[Layout], schedules: Sequence[str]) -> FloatArray:
    """`(num_layouts, num_batches)`, over the schedules; without recomputation, which only adds."""
    chunks = {2 if schedule == "interleaved" else 1 for schedule in schedules}
    tables = [
        layout_bounds(scorer.workload, scorer.cluster, of_kind, Variant(num_chunks=num), wire_bytes=scorer.wire_bytes)
        for num in sorted(chunks | {1})
    ]
    return np.min(tables, axis=0)


def _best_of_layout(
    scorer: Scorer,
    layout: Layout,
    bounds: FloatArray,
    limit: float,
    best: Candidate | None,
    result: SearchResult,
    rules: Constraints,
    schedules: Sequence[str],
    balance: bool,
) -> Candidate | None:
    """The best of `best` and the layout's plans that score below `limit`."""
    workload = scorer.workload
    full: set[str] = set()  # schedules for which even this many, this small microbatches do not fit
    for schedule, chunks, count in draft_plans(layout, len(workload.batches[0]), schedules):
        if schedule in full:
            continue
        full.add(schedule)
        slower: list[Plan] = []  # with less recomputation, and not below the limit: do they fit?
        for again in checkpointing_variants(workload):
            plan = make_candidate(workload, layout, schedule, chunks, count, again, balance=balance)
            if plan is None:
                result.rejected["fewer layers than stages"] += 1
                break
            if (broken := rules.rejects(plan)) is not None:
                result.rejected[broken] += 1
                full.discard(schedule)
                continue
            if not scorer.fits(plan, composed=False):
                _note_misfit(scorer, plan, result)
                continue
            full.discard(schedule)
            # seconds first: bytes need all batches composed
            seconds = _score(scorer, plan, bounds, limit)
            if seconds is not None and scorer.fits(plan, composed=True):
                if not any(scorer.fits(less, composed=True) for less in slower):
                    best = Candidate(plan=plan, seconds=seconds)
                    result.scored.append(best)
                    limit = best.mean_s
                break
            if seconds is not None:
                _note_misfit(scorer, plan, result)
            else:
                slower.append(plan)
    return best


def _score(scorer: Scorer, plan: Plan, bounds: FloatArray, limit: float) -> FloatArray | None:
    """Seconds of every batch; None as soon as their mean cannot be below `limit`."""
    known = bounds.copy()
    for batch in range(known.size):
        if plan.schedule != "1f1b":  # its order is slow to make
            known[batch] = max(known[batch], scorer.composed_bound(plan, batch))
            if known.mean() >= limit:
                return None
        known[batch] = scorer.seconds(plan, batch)
        if known.mean() >= limit:
            return None
    return known


def _note_misfit(scorer: Scorer, plan: Plan, result: SearchResult) -> None:
    result.rejected["memory of microbatches in flight"] += 1
    need = float((np.array(scorer.bytes_of(plan, False)) / scorer.room(plan)).max())
    if need <= 1:
        need = float((np.array(scorer.bytes_of(plan, True)) / scorer.room(plan)).max())
    _note_closest(result, need, plan)
