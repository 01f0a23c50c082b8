"""Costs that correct themselves: measured steps → the next cost version, declared for a step ahead on all ranks.

Input: `MeasuredStep`s, equal on every rank. Output: versions declared in the sampler's `costs`, a log line for each,
warnings that name slow ranks, and a state for the checkpoint.

Every rank computes the next version from the same gathered numbers by the same operations, so none has to be sent.
It holds from the first step that no rank has planned yet: whatever lies in the planning thread or was drawn by loader
workers keeps the version that it was planned with.

Assumptions: ranks meet once per step, so that the time of a microbatch is its own (see `timing`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_dflop.cost import OnlineFit, Refinement, refine
from hf_dflop.cost.fit import RATE_TERMS
from hf_dflop.cost.slowness import RankSpeeds
from hf_dflop.data.sampler import BalancedBatchSampler
from hf_dflop.data.versions import CostVersion, CostVersions
from hf_dflop.errors import ModelError, TrainerError
from hf_dflop.integrations.describe import choose_objective
from hf_dflop.integrations.measured import MeasuredStep

__all__ = ["Correct", "Correction", "start_correction"]

logger = logging.getLogger(__name__)

KEY = "hf_dflop.correction"
"""Where `TrainerState.stateful_callbacks` keeps the state. Not the callback's class name: Trainer would build the
callback anew from it, without its dataset."""

LOG_KEYS = ("dflop/cost_version", "dflop/prediction_error", "dflop/slowdown_max", "dflop/slow_rank")
"""What `Correction.logs` may give."""

WARM_UP_STEPS = 2
"""Steps at the start of every run whose times are left out: compilation, first allocations."""
_MAX_MICROBATCHES = 2048
"""Of more, whole steps are left out, so that learning stays quick on many ranks."""
_SPEED_CHANGE = 0.03


@dataclass(frozen=True, slots=True)
class Correct:
    """What the user asked for."""

    when: bool | str
    every: int = field(kw_only=True)
    slow_ranks: str = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.when not in (True, False, "auto"):
            raise ValueError(f"correct={self.when!r}; choose True, False or 'auto'")
        if self.slow_ranks not in ("name", "rebalance"):
            raise ValueError(f"slow_ranks={self.slow_ranks!r}; choose 'name' or 'rebalance'")
        if self.slow_ranks == "rebalance" and self.when is False:
            raise ValueError("slow_ranks='rebalance' needs measured times; leave out correct=False")
        if self.every < 1:
            raise ValueError(f"correct_every={self.every}; it must be at least 1 optimizer step")


def start_correction(trainer: Any, sampler: Any, state: Any, asked: Correct) -> "Correction | None":
    """The correction of this run; None where there is nothing to correct. Takes over the costs of a checkpoint.

    Raises:
        TrainerError: correction was asked for where a microbatch's own time cannot be measured.
    """
    if not isinstance(sampler, BalancedBatchSampler):
        if asked.when is True or asked.slow_ranks == "rebalance":
            raise TrainerError(
                "correct=True needs microbatches that the callback's sampler composes in this process; this loader "
                'has none. Use correct="auto", slow_ranks="name".'
            )
        return None
    meets = choose_objective(trainer)
    num_ranks = trainer.accelerator.num_processes
    hidden = {"slot": "after every microbatch", "stage": "in every layer"}.get(meets)
    if hidden is not None and (asked.when is True or asked.slow_ranks == "rebalance"):
        raise TrainerError(
            f"correct=True, but ranks meet {hidden} here: a microbatch's time holds the waiting for others, and a "
            "slow rank looks like all. Give measured costs (CostModel.fit) as cost_model, and correct=False."
        )
    learns = asked.when is True or (
        asked.when == "auto" and hidden is None and num_ranks > 1 and not trainer.args.full_determinism
    )
    correction = Correction(
        sampler.costs,
        num_ranks=num_ranks,
        steps_per_epoch=sampler.position(1, 0),
        every=asked.every if learns else 0,
        rebalances=asked.slow_ranks == "rebalance",
    )
    correction.restore(state)
    if not learns:
        logger.info("hf_dflop: costs are not corrected by measured times (correct=%r)", asked.when)
    return correction


class Correction:
    """Learns from measured steps and declares cost versions.

    Args:
        costs ([`CostVersions`]): of the sampler.
        num_ranks (`int`): data-parallel ranks.
        steps_per_epoch (`int`): optimizer steps of an epoch.
        every (`int`): optimizer steps between two looks at the measurements; 0 never looks.
        rebalances (`bool`): a slow rank gets less work; otherwise it is only named.
    """

    def __init__(
        self, costs: CostVersions, *, num_ranks: int, steps_per_epoch: int, every: int, rebalances: bool
    ) -> None:
        self._costs = costs
        self._base = costs.newest.model
        self._num_ranks = num_ranks
        self._steps_per_epoch = steps_per_epoch
        self._every = every
        self._rebalances = rebalances
        self._num_seen = 0
        self._pending: list[MeasuredStep] = []
        self._said: set[str] = set()
        self._last: Refinement | None = None
        self.fit = OnlineFit.start(self._base, num_ranks)

    def is_due(self, global_step: int) -> bool:
        """Whether all ranks gather their times after this step."""
        return self._every > 0 and global_step % self._every == 0

    def see(self, steps: Sequence[MeasuredStep]) -> None:
        """Keep steps until `learn` is called, in the order in which they ran."""
        if self._every:
            self._pending += steps

    def learn(self) -> None:
        """Refine the costs with the steps seen since the last call, and declare a new version if it is worth it.

        Raises:
            TrainerError: the ranks' costs differ.
        """
        steps, self._pending = self._pending, []
        if not steps:
            return
        self._check_agreement(steps[-1])
        used = [step for number, step in enumerate(steps, self._num_seen) if number >= WARM_UP_STEPS]
        self._num_seen += len(steps)
        used = [step for step in used if step.plan is not None and step.plan.cost_version is not None]
        per_step = max((step.slot_s.size for step in used), default=1)
        used = used[:: max(1, -(-len(used) * per_step // _MAX_MICROBATCHES))]
        if not used:
            return
        flops, seconds, rank = [], [], []
        for step in used:
            assert step.plan is not None
            for r in range(self._num_ranks):
                microbatches = step.plan.microbatches(r)
                flops.append(self._costs.microbatch_flops(microbatches))
                seconds.append(step.slot_s[r, : len(microbatches)])
                rank.append(np.full(len(microbatches), r))
        newest = self._costs.newest
        slow_before = self.fit.speeds.slow_ranks
        self.fit, found = refine(
            self.fit,
            self._base,
            newest.model,
            np.concatenate(flops),
            np.concatenate(seconds),
            np.concatenate(rank),
            steps=len(steps),
        )
        self._last = found
        self._say(found, slow_before)
        speeds = self.fit.speeds.speeds if self._rebalances else None
        if found.changed or _differ(speeds, newest.rank_speeds):
            self._declare(found, speeds, int(steps[-1].planned_through.max()) + 1)

    def _declare(self, found: Refinement, speeds: tuple[float, ...] | None, from_step: int) -> None:
        newest = self._costs.newest
        model = found.model if found.changed else newest.model
        # Two versions may be declared before the first of them holds.
        from_step = max(from_step, newest.from_step)
        self._costs.declare(
            CostVersion(number=newest.number + 1, from_step=from_step, model=model, rank_speeds=speeds)
        )
        factors = ", ".join(
            f"{name.replace('_', ' ')} x {getattr(self._base.rates, name) / getattr(model.rates, name):.3g}"
            for name in RATE_TERMS
        )
        logger.info(
            "hf_dflop: cost version %d holds from step %d on. Seconds of the initial costs: %s; predictions off by "
            "%.1f %% of a microbatch, before by %.1f %%%s",
            newest.number + 1,
            from_step + 1,
            factors,
            100 * found.error,
            100 * found.error_before,
            "" if speeds is None else f"; speeds of the ranks {[round(speed, 2) for speed in speeds]}",
        )

    def _check_agreement(self, step: MeasuredStep) -> None:
        if len(set(step.digest.tolist())) > 1:
            raise TrainerError(
                f"the ranks' cost versions differ (digests {step.digest.tolist()}), so their microbatches would not "
                "make up the step any more. Please report this; DflopCallback(correct=False) goes on without."
            )

    def _say(self, found: Refinement, slow_before: tuple[int, ...]) -> None:
        if found.num_unusable:
            self._once(
                "unusable",
                f"{found.num_unusable} of {found.num_used + found.num_unusable} microbatches have no usable time (not "
                "measured, or not above 0); costs are corrected with the others",
            )
        if found.num_used and found.undetermined:
            self._once(
                "undetermined " + " ".join(found.undetermined),
                "the microbatches so far do not tell these costs apart: "
                f"{', '.join(name.replace('_', ' ') for name in found.undetermined)}; their ratios stay",
            )
        slow = self.fit.speeds.slow_ranks
        for rank in slow:
            if rank not in slow_before:
                logger.warning(
                    "hf_dflop: rank %d is slow: it takes %.2f times as long as the usual rank for the same work. %s",
                    rank,
                    self.fit.speeds.slowness[rank],
                    "It gets less work from now on."
                    if self._rebalances
                    else 'The others wait for it; look at its machine, or give it less work: slow_ranks="rebalance".',
                )
        for rank in slow_before:
            if rank not in slow:
                logger.warning("hf_dflop: rank %d is as fast as the others again", rank)

    def _once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning("hf_dflop: %s", message)

    def logs(self) -> dict[str, float]:
        """What goes into the log record: the newest version, and how well it predicts."""
        logs = {"dflop/cost_version": float(self._costs.newest.number)}
        if self._last is not None and self._last.num_used:
            logs["dflop/prediction_error"] = self._last.error_before
            logs["dflop/slowdown_max"] = max(self.fit.speeds.slowness)
            slow = self.fit.speeds.slow_ranks
            if slow:
                logs["dflop/slow_rank"] = float(slow[0])
        return logs

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def remember(self, state: Any) -> None:
        """Put the versions in force and to come, and what was learned, where Trainer saves it with a checkpoint."""
        state.stateful_callbacks[KEY] = {
            "args": {},
            "attributes": {
                "base": self._base.to_dict(),
                "fit": self.fit.to_dict(),
                "versions": [version.to_dict() for version in self._costs.in_force(state.global_step)],
                "num_ranks": self._num_ranks,
                "steps_per_epoch": self._steps_per_epoch,
            },
        }

    def restore(self, state: Any) -> None:
        """Go on with the costs of the checkpoint that `state` was loaded from, if they are of this model."""
        record = (state.stateful_callbacks or {}).get(KEY)
        if record is None or not state.global_step:
            return
        kept = record["attributes"]
        try:
            fit = OnlineFit.from_dict(kept["fit"])
            versions = [CostVersion.from_dict(version) for version in kept["versions"]]
            same_ranks = kept["num_ranks"] == self._num_ranks
            same_steps = kept["steps_per_epoch"] == self._steps_per_epoch
        except (KeyError, ModelError) as error:
            logger.warning("hf_dflop: the checkpoint's cost versions are not readable (%s): begun anew", error)
            return
        if fit.base != self._base.version:
            logger.warning(
                "hf_dflop: the checkpoint corrected other costs (%s) than those of this run (%s): begun anew",
                fit.base,
                self._base.version,
            )
            return
        if not same_steps:  # its count of steps means nothing here: the newest version holds at once
            versions = [replace(versions[-1], from_step=0)]
        if not same_ranks:  # rank 3 may be another machine now
            versions = [replace(version, rank_speeds=None) for version in versions]
            fit = replace(fit, speeds=RankSpeeds.even(self._num_ranks))
        self.fit = fit
        self._costs.restore(versions)
        self.remember(state)


def _differ(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> bool:
    """Whether ranks' speeds changed enough to balance anew."""
    if one is None or other is None:
        return one is not other
    return any(abs(a / b - 1.0) > _SPEED_CHANGE for a, b in zip(one, other, strict=True))
