"""The record of an assignment: which samples make up each rank's microbatches, and what that is predicted to cost."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import BalanceError

__all__ = ["Assignment", "Groups"]

Groups = tuple[tuple[npt.NDArray[np.int64], ...], ...]
"""rank -> slot -> sample positions."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assignment:
    """Samples of one step in microbatches, predicted and bounded."""

    groups: Groups
    """`groups[rank][slot]`: positions (0 .. num_samples - 1) of the samples of that microbatch, int64."""
    objective: str
    """Name of the objective that was minimised."""
    predicted_s: float
    """Objective of `groups`, seconds."""
    baseline_s: float
    """Objective of the baseline grouping, seconds; nan without a baseline."""
    bound_s: float
    """Seconds that no assignment can go below."""
    rank_busy_s: npt.NDArray[np.float64]
    """Predicted seconds of compute (vision + LLM, padding included) of each rank, `(num_ranks,)`."""
    imbalance: float
    """Predicted idle fraction: 1 - mean busy ÷ objective. With "pipeline", where a slot has two stages, each as long
    as the objective: 1 - mean busy ÷ (2 × slots × objective), without fill and drain."""
    baseline_imbalance: float
    """The same of the baseline; nan without a baseline."""
    is_baseline: bool = False
    """Whether the baseline was kept because nothing better was found."""
    is_spread: bool | None = None
    """Whether every microbatch has a sample that was to be spread; None when nothing was to be."""

    @property
    def gap(self) -> float:
        """predicted ÷ bound - 1: how far from the best at most; 0 when all costs are 0."""
        return self.predicted_s / self.bound_s - 1.0 if self.bound_s > 0 else 0.0

    @property
    def speedup(self) -> float:
        """Baseline ÷ predicted seconds; nan without a baseline, 1 when all costs are 0."""
        return self.baseline_s / self.predicted_s if self.predicted_s > 0 else 1.0

    @property
    def num_samples(self) -> int:
        return sum(len(group) for rank in self.groups for group in rank)

    def place(self) -> npt.NDArray[np.int64]:
        """(rank, slot) of each sample, `(num_samples, 2)`."""
        place = np.empty((self.num_samples, 2), dtype=np.int64)
        for rank, slots in enumerate(self.groups):
            for slot, group in enumerate(slots):
                place[group] = rank, slot
        return place

    def validate(self, num_samples: int | None = None) -> None:
        """Check that every sample is in exactly one microbatch and no microbatch is empty.

        Raises:
            BalanceError: a sample is missing or twice, a microbatch is empty, or ranks differ in their slots.
        """
        check_groups(self.groups, self.num_samples if num_samples is None else num_samples, "the assignment")


def check_groups(groups: Groups, num_samples: int, name: str) -> None:
    """Raise a `BalanceError` unless `groups` is a partition of 0 .. num_samples - 1 into non-empty microbatches."""
    if len({len(slots) for slots in groups}) > 1:
        counts = [len(slots) for slots in groups]
        raise BalanceError(f"{name} gives the ranks {counts} microbatches; every rank needs the same number")
    for rank, slots in enumerate(groups):
        for slot, group in enumerate(slots):
            if not len(group):
                raise BalanceError(
                    f"{name} has no sample in microbatch {slot} of rank {rank}; every microbatch needs one"
                )
    flat = np.concatenate([group for slots in groups for group in slots])
    outside = flat[(flat < 0) | (flat >= num_samples)]
    if outside.size:
        raise BalanceError(f"{name} holds sample {outside[0]}; positions are 0 to {num_samples - 1}")
    times = np.bincount(flat, minlength=num_samples)
    if (times != 1).any():
        sample = int((times != 1).argmax())
        raise BalanceError(f"{name} holds sample {sample} {times[sample]} times; each sample must be there once")
