"""What can be said of all layouts at once, before a plan is made: bounds on seconds, what they need of memory, what a
user's constraints leave.

In: a `Scorer`, a `LayoutTable`. Out: for each layout and each way to recompute, the seconds that no plan of it goes
below, inf where none fits; the same again for single numbers of microbatches, for the layouts that are worth it.
"""

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.bound import Variant, layout_bounds
from hf_dflop.plan.candidates import NUM_CHUNKS, checkpointing_variants, count_range
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.least_need import LeastNeed
from hf_dflop.plan.score import ROUNDING, Scorer
from hf_dflop.plan.space import LayoutTable

__all__ = ["Shortlist"]

FloatArray = npt.NDArray[np.float64]
BLOCK = 32_768
"""Layouts that are bounded together: a million at once would take a gigabyte."""


class Shortlist:
    """Layouts, bounded.

    Args:
        scorer (`Scorer`): workload, cluster, memory rule.
        table (`LayoutTable`): the layouts.
        rules (`Constraints`): those that a layout alone decides are applied.
        interleaved (`bool`): whether a rank may have several stages.
        balance (`bool`): microbatches composed by cost, or as the stock sampler deals them.
    """

    def __init__(
        self, scorer: Scorer, table: LayoutTable, rules: Constraints, *, interleaved: bool, balance: bool = True
    ) -> None:
        self._scorer, self.table, self._balance = scorer, table, balance
        self.variants = [
            Variant(*again, chunks)
            for chunks in ((1, NUM_CHUNKS) if interleaved else (1,))
            for again in checkpointing_variants(scorer.workload)
        ]
        self.kept, self.ruled_out = rules.kept_by(table)
        self._least = LeastNeed(scorer.workload, scorer.rule, scorer.largest_room)
        batch = len(scorer.workload.batches[0])
        self.fewest, self.most = count_range(table, batch)
        num_batches = scorer.workload.num_batches
        self.bounds = np.empty((len(table), num_batches))
        """`(num_layouts, num_batches)`: of any plan; inf where none fits."""
        self.static_need = np.empty(len(table))
        """`(num_layouts,)`: bytes of weights and optimizer state ÷ room, with the least recomputation."""
        self.need = np.empty(len(table))
        """The same with activations."""
        for first in range(0, len(table), BLOCK):
            here = slice(first, first + BLOCK)
            bounds, static, need = self._of(table[here], self.fewest[here], self.most[here])
            self.bounds[here] = bounds.min(axis=0)
            self.static_need[here] = static.min(axis=0)
            self.need[here] = need.min(axis=0)
        self.bounds[~self.kept] = np.inf

    def _of(
        self,
        table: LayoutTable,
        fewest: npt.NDArray[np.int64],
        most: npt.NDArray[np.int64],
        stock_count: int | None = None,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Seconds `(num_variants, num_layouts, num_batches)`, and both needs `(num_variants, num_layouts)`."""
        scorer = self._scorer
        seconds, statics, needs = [], [], []
        for variant in self.variants:
            bounds = layout_bounds(
                scorer.workload,
                scorer.cluster,
                table,
                variant,
                counts=fewest,
                wire_bytes=scorer.wire_bytes,
                stock_count=stock_count,
            )
            static, need, traffic = self._least.of(table, variant, most)
            static, need = (np.where(np.isnan(value), np.inf, value) for value in (static, need))
            with np.errstate(invalid="ignore"):
                bounds = bounds + (traffic / scorer.cluster.reference.memory_bytes_per_s)[:, None]
                bounds *= 1 - ROUNDING
            seconds.append(np.where((need > 1)[:, None] | np.isnan(bounds), np.inf, bounds))
            statics.append(static)
            needs.append(need)
        return np.array(seconds), np.array(statics), np.array(needs)

    def of_count(self, which: npt.NDArray[np.int64], count: int) -> FloatArray:
        """Seconds of the layouts `which` with `count` microbatches, `(num_variants, len(which), num_batches)`."""
        counts = np.full(which.size, count)
        found = self._of(self.table[which], counts, counts)[0]
        if not self._balance:
            found = np.maximum(found, self._of(self.table[which], counts, counts, count)[0])
        return found
