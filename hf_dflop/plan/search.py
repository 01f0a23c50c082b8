"""The best plan: best first, with bounds that hold.

In: a `Scorer`, layouts, constraints. Out: the plan of least expected seconds of each kind (DDP, FSDP, HSDP, colocated,
disjoint) and so of all, what was rejected and why.

Layouts are taken in the order of their bounds, some at a time, and of those the drafts (schedule, number of
microbatches) in the order of theirs. A layout whose bound is not below the best score so far ends the search of its
kind: all later ones have higher bounds. A plan is scored batch by batch, and given up when its score so far and the
bounds of the other batches cannot be below the best. So nothing that could win is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.candidates import SEARCHED_SCHEDULES, draft_plans, make_candidate
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.shortlist import Shortlist
from hf_dflop.plan.space import PLACED, Layout, LayoutTable

__all__ = ["KINDS", "Candidate", "SearchResult", "kind_of", "search"]

KINDS: tuple[str, ...] = ("DDP", "FSDP", "HSDP", "colocated", "disjoint")
FloatArray = npt.NDArray[np.float64]
TOGETHER = (8, 256)
"""Layouts whose drafts are put in order together: at first, and at most. It grows: most searches end soon."""
NEAR = 1.25
"""The best plan of a kind is found exactly where it is within this factor of the best of the kinds before it."""


def kind_of(layout: Layout) -> str:
    """The kind of a layout, one of `KINDS`."""
    if layout.placement != "replicated":
        return layout.placement
    return "DDP" if layout.shards == 1 else "FSDP" if layout.shards == layout.l_dp else "HSDP"


def _kinds_of(table: LayoutTable) -> npt.NDArray[np.int64]:
    """The same of a table, as places in `KINDS`."""
    shards, replicas = table.column("shards"), table.column("l_dp")
    plain = np.where(shards == 1, 0, np.where(shards == replicas, 1, 2))
    return np.where(table.columns[0] == PLACED.index("replicated"), plain, np.where(table.is_disjoint, 4, 3))


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
    table = LayoutTable.of(found)
    shortlist = Shortlist(scorer, table, rules, interleaved="interleaved" in schedules, balance=balance)
    result.rejected.update({text: count for text, count in shortlist.ruled_out.items() if count})
    one = _Search(scorer, shortlist, result, rules, tuple(schedules), balance)
    kind_number = _kinds_of(table)
    done, overall = 0, np.inf
    for number, kind in enumerate(KINDS):
        of_kind = np.flatnonzero((kind_number == number) & shortlist.kept)
        if kind not in kinds or not of_kind.size:
            continue
        roomy = one.roomy(of_kind)
        limit = overall * (NEAR if every_kind else 1.0)

        def tell(more: int, done: int = done) -> None:
            if progress is not None:
                progress(done + more, len(found))

        best = one.best_of(roomy, limit, tell)
        done += of_kind.size
        if best is not None:
            result.best[kind] = best
            overall = min(overall, best.mean_s)
    if result.winner is None:
        one.note_nearest()
    if progress is not None:
        progress(len(found), len(found))
    result.scored.sort(key=lambda one: one.mean_s)
    return result


class _Draft(NamedTuple):
    """A layout with a schedule and a number of microbatches, and what is known of its plans."""

    bound: float
    layout: Layout
    schedule: str
    chunks: int
    num_microbatches: int
    seconds: FloatArray
    """`(num_variants, num_batches)`: bounds under each recomputation, least first."""


class _Search:
    """What the search of one kind after the other shares."""

    def __init__(
        self,
        scorer: Scorer,
        shortlist: Shortlist,
        result: SearchResult,
        rules: Constraints,
        schedules: tuple[str, ...],
        balance: bool,
    ) -> None:
        self.scorer, self.shortlist, self.result, self.rules = scorer, shortlist, result, rules
        self.schedules, self.balance = schedules, balance
        self.batch_size = len(scorer.workload.batches[0])
        self.nearest: tuple[float, int] = (np.inf, -1)
        """Need and place of the layout that fits least badly, of those that memory rules out."""

    def roomy(self, which: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of which some plan may fit."""
        result, static, need = self.result, self.shortlist.static_need[which], self.shortlist.need[which]
        heavy, full = static > 1, (static <= 1) & (need > 1)
        result.rejected.update(
            {
                reason: int(where.sum())
                for reason, where in (
                    ("memory of weights and optimizer state", heavy),
                    ("memory of microbatches in flight", full),
                )
                if where.any()
            }
        )
        out = np.where(heavy | full, need, np.inf)
        if which.size and out.min() < self.nearest[0]:
            self.nearest = (float(out.min()), int(which[out.argmin()]))
        return which[~(heavy | full)]

    def plan(self, layout: Layout, schedule: str, chunks: int, count: int, again: tuple[bool, bool]) -> Plan | None:
        """The plan; None where it has fewer layers than stages."""
        return make_candidate(self.scorer.workload, layout, schedule, chunks, count, again, balance=self.balance)

    def note_nearest(self) -> None:
        """Of the layouts that were ruled out by memory, the plan that comes nearest."""
        need, place = self.nearest
        if not np.isfinite(need):
            return
        layout, count = self.shortlist.table.layout(place), int(self.shortlist.most[place])
        for variant in self.shortlist.variants:
            plan = self.plan(layout, "1f1b", 1, count, variant[:2]) if variant.num_chunks == 1 else None
            if plan is not None:
                self.note_misfit(plan, composed=True, counted=False)

    def best_of(self, which: npt.NDArray[np.int64], limit: float, tell: Callable[[int], None]) -> Candidate | None:
        """The best plan of these layouts that scores below `limit`."""
        means = self.shortlist.bounds[which].mean(axis=1)
        order = np.argsort(means, kind="stable")
        best: Candidate | None = None
        first, size = 0, TOGETHER[0]
        while first < order.size:
            here = order[first : first + size]
            worth = int(np.searchsorted(means[here], limit))  # inf never is
            for draft in self.drafts(which[here[:worth]]):
                if draft.bound >= limit:
                    break
                found = self.best_of_draft(draft, limit)
                if found is not None:
                    best, limit = found, found.mean_s
            if worth < here.size:
                self.result.num_bounded += order.size - first - worth
                break
            first, size = first + here.size, min(2 * size, TOGETHER[1])
            tell(first)
        return best

    def drafts(self, which: npt.NDArray[np.int64]) -> list[_Draft]:
        """The drafts of these layouts, in the order of their bounds."""
        found = []
        variants = self.shortlist.variants
        bounds: dict[int, FloatArray] = {}
        for at, place in enumerate(which.tolist()):
            layout = self.shortlist.table.layout(place)
            for schedule, chunks, count in draft_plans(layout, self.batch_size, self.schedules):
                if count not in bounds:
                    bounds[count] = self.shortlist.of_count(which, count)
                rows = [number for number, variant in enumerate(variants) if variant.num_chunks == chunks]
                seconds = bounds[count][rows, at]
                bound = float(seconds.mean(axis=1).min())
                found.append(_Draft(bound, layout, schedule, chunks, count, seconds))
        found.sort(key=lambda draft: draft.bound)
        return found

    def best_of_draft(self, draft: _Draft, limit: float) -> Candidate | None:
        """Of the draft's plans the one with the least recomputation that fits, if it scores below `limit`."""
        scorer, result = self.scorer, self.result
        slower: list[Plan] = []  # with less recomputation, and not below the limit: do they fit?
        chunk_variants = [variant for variant in self.shortlist.variants if variant.num_chunks == draft.chunks]
        for variant, known in zip(chunk_variants, draft.seconds, strict=True):
            if np.isinf(known).any():
                result.rejected["memory of microbatches in flight"] += 1
                continue
            plan = self.plan(draft.layout, draft.schedule, draft.chunks, draft.num_microbatches, variant[:2])
            if plan is None:
                result.rejected["fewer layers than stages"] += 1
                break
            if (broken := self.rules.rejects(plan)) is not None:
                result.rejected[broken] += 1
                continue
            if known.mean() >= limit:  # whether it fits does not matter, unless one with more recomputation wins
                slower.append(plan)
                continue
            # seconds first: bytes need all batches composed
            seconds = self.score(plan, known, limit)
            if seconds is None:
                slower.append(plan)
            elif not seconds.size:
                self.note_misfit(plan, composed=False)
            elif not scorer.fits(plan, composed=True):
                self.note_misfit(plan, composed=True)
            else:
                if any(scorer.fits(less, composed=True) for less in slower):
                    return None
                best = Candidate(plan=plan, seconds=seconds)
                result.scored.append(best)
                return best
        return None

    def score(self, plan: Plan, bounds: FloatArray, limit: float) -> FloatArray | None:
        """Seconds of every batch; None as soon as their mean cannot be below `limit`; none of them (size 0) where the
        plan cannot fit."""
        known = bounds.copy()
        fits = self.scorer.fits
        for batch in range(known.size):
            for number, bound in enumerate(self.scorer.part_bounds(plan, batch)):
                known[batch] = max(known[batch], bound)
                if known.mean() >= limit:
                    return None
                if batch == number == 0 and not fits(plan, composed=False):  # the bound was quicker
                    return np.empty(0)
            stages = self.scorer.stages(plan, batch)
            known[batch] = max(known[batch], self.scorer.composed_bound(plan, stages))
            if known.mean() >= limit:
                return None
            if batch == 0 and not fits(plan, composed=False):
                return np.empty(0)
            known[batch] = self.scorer.seconds(plan, batch, stages)
            if known.mean() >= limit:
                return None
        return known

    def note_misfit(self, plan: Plan, *, composed: bool, counted: bool = True) -> None:
        """Count a plan that does not fit, and remember it if it is the nearest so far."""
        if counted:
            self.result.rejected["memory of microbatches in flight"] += 1
        need = self.scorer.need(plan, composed=composed)
        if self.result.closest is None or need < self.result.closest[0]:
            self.result.closest = (need, plan)
