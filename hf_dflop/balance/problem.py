"""The checked arrays of one assignment problem, in ticks: what starts, search and bound all read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.checks import checked_counts, checked_slowness
from hf_dflop.balance.objective import objective_code
from hf_dflop.balance.ticks import checked_seconds, to_ticks
from hf_dflop.errors import BalanceError

__all__ = ["OVERSIZE", "SLOWNESS_BITS", "Problem", "checked_problem"]

SLOWNESS_BITS = 10
"""Slowness is counted in 2**-SLOWNESS_BITS, so that times stay whole numbers."""

OVERSIZE = ("error", "alone")
"""What becomes of a sample above a cap."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """Samples to group into `num_ranks` x `num_slots` microbatches."""

    vision: npt.NDArray[np.int64]
    """Vision ticks of each sample, `(num_samples,)`."""
    llm: npt.NDArray[np.int64]
    """LLM ticks of each sample alone, `(num_samples,)`."""
    bits: int
    """A tick is 2**-bits seconds."""
    weights: npt.NDArray[np.int64]
    """`(num_samples, k)`: the counts under a cap (tokens, patches), as far as caps are given."""
    caps: npt.NDArray[np.int64]
    """`(k,)`."""
    padded_caps: npt.NDArray[np.bool_]
    """`(k,)`: whether the count is number of samples × largest (padded tokens) and not the sum."""
    cap_names: tuple[str, ...]
    """Names of the `k` counts, for messages."""
    is_spread: npt.NDArray[np.bool_] | None
    """`(num_samples,)`: samples of which every group needs one; None: no such samples, or too few of them."""
    memory: npt.NDArray[np.int64]
    """`(num_samples, 2)`: what activations grow with (tokens and patches, or the ticks where not given)."""
    slowness: npt.NDArray[np.int64]
    """Time that a cost takes on each rank, in 1/1024 of what is usual, `(num_ranks,)`."""
    num_ranks: int
    num_slots: int
    padded: bool
    objective: str
    code: int
    """Number of the objective in the compiled search."""

    @property
    def num_samples(self) -> int:
        return int(self.vision.size)

    @property
    def num_groups(self) -> int:
        return self.num_ranks * self.num_slots

    @property
    def is_even(self) -> bool:
        """Whether all ranks are equally fast."""
        return bool((self.slowness == self.slowness[0]).all())

    @property
    def inverse_speed(self) -> npt.NDArray[np.float64]:
        """`slowness` as a factor, `(num_ranks,)`."""
        return self.slowness / 2.0**SLOWNESS_BITS

    @property
    def limits(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Weights, caps and padded caps as the search reads them: what is to be spread is a cap of -1, a floor."""
        if self.is_spread is None:
            return self.weights, self.caps, self.padded_caps
        weights = np.concatenate([self.weights, self.is_spread[:, None].astype(np.int64)], axis=1)
        return weights, np.append(self.caps, -1), np.append(self.padded_caps, False)

    def group_costs(self, group: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Vision and LLM ticks of each group, `(num_groups,)` each; `group` is the group of each sample."""
        # float64 holds sums of ticks exactly
        vision = np.bincount(group, self.vision, self.num_groups).astype(np.int64)
        if not self.padded:
            return vision, np.bincount(group, self.llm, self.num_groups).astype(np.int64)
        llm = np.zeros(self.num_groups, dtype=np.int64)
        np.maximum.at(llm, group, self.llm)
        return vision, llm * np.bincount(group, minlength=self.num_groups)


def checked_problem(
    vision_s: Any,
    llm_s: Any,
    *,
    num_ranks: int,
    num_slots: int,
    objective: str,
    padded: bool,
    tokens: Any,
    max_tokens: int | None,
    patches: Any,
    max_patches: int | None,
    spread: Any,
    rank_speeds: Any = None,
    oversize: str = "error",
) -> Problem:
    """Check the arguments of `assign` and turn seconds into ticks; raises as `assign` does."""
    code = objective_code(objective)
    if oversize not in OVERSIZE:
        raise ValueError(f"unknown oversize {oversize!r}; choose one of {', '.join(map(repr, OVERSIZE))}")
    if num_ranks < 1 or num_slots < 1:
        raise BalanceError(f"num_ranks={num_ranks} and num_slots={num_slots}; both must be at least 1")
    vision = checked_seconds(vision_s, "vision_s")
    llm = checked_seconds(llm_s, "llm_s")
    if vision.ndim != 1 or vision.shape != llm.shape:
        raise BalanceError(
            f"vision_s has shape {vision.shape} and llm_s {llm.shape}; expected (num_samples,) for both"
        )
    n = vision.size
    if n < num_ranks * num_slots:
        raise BalanceError(
            f"{n} samples cannot fill {num_ranks} ranks x {num_slots} microbatches = {num_ranks * num_slots}; every "
            f"microbatch needs a sample. Use a global batch of at least {num_ranks * num_slots} samples, fewer "
            "accumulation steps, or fewer ranks."
        )
    largest = max(float(vision.max()), float(llm.max()))
    vision_ticks, bits = to_ticks(vision, num_terms=2 * n, largest=largest)
    llm_ticks, _ = to_ticks(llm, num_terms=2 * n, largest=largest)
    memory = np.stack([llm_ticks, vision_ticks], axis=1)
    columns: list[npt.NDArray[np.int64]] = []
    caps: list[int] = []
    names: list[str] = []
    alone = np.zeros(n, dtype=np.bool_)
    for column, (name, counts, cap) in enumerate([("tokens", tokens, max_tokens), ("patches", patches, max_patches)]):
        if counts is not None:
            memory[:, column] = checked_counts(counts, name, n)
        if cap is None:
            continue
        if counts is None:
            raise BalanceError(f"max_{name}={cap} was given without {name}; give the {name} of each sample too")
        whole = memory[:, column].copy()
        worst = int(whole.argmax())
        if whole[worst] > cap and oversize == "error":
            raise BalanceError(
                f"sample {worst} has {whole[worst]} {name}, above max_{name}={cap} per microbatch: no microbatch can "
                f"hold it. Raise max_{name} to at least {whole[worst]}, shorten or drop the sample, or let it run in "
                'a microbatch of its own with oversize="alone".'
            )
        alone |= whole > cap
        whole = np.minimum(whole, cap)
        columns.append(whole)
        caps.append(int(cap))
        names.append(name)
    if alone.any():  # a microbatch that holds one of them is full, so that nothing joins it
        columns.append(np.where(alone, n, 1))
        caps.append(n)
        names.append("samples")
    return Problem(
        vision=vision_ticks,
        llm=llm_ticks,
        bits=bits,
        weights=np.stack(columns, axis=1) if columns else np.zeros((n, 0), dtype=np.int64),
        caps=np.array(caps, dtype=np.int64),
        padded_caps=np.array([padded and name == "tokens" for name in names], dtype=np.bool_),
        cap_names=tuple(names),
        is_spread=_checked_spread(spread, n, num_ranks * num_slots),
        memory=memory,
        slowness=checked_slowness(rank_speeds, num_ranks, SLOWNESS_BITS),
        num_ranks=int(num_ranks),
        num_slots=int(num_slots),
        padded=bool(padded),
        objective=objective,
        code=code,
    )


def _checked_spread(spread: Any, num_samples: int, num_groups: int) -> npt.NDArray[np.bool_] | None:
    if spread is None:
        return None
    mask = np.asarray(spread)
    if mask.shape != (num_samples,) or mask.dtype != np.bool_:
        raise BalanceError(
            f"spread has shape {mask.shape} and dtype {mask.dtype}; expected ({num_samples},) booleans, one per sample"
        )
    return mask if int(mask.sum()) >= num_groups else None
