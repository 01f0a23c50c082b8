"""Which samples this rank loads for each microbatch of each optimizer step.

Takes the stock grouping of one epoch (what every rank would have loaded without hf_dflop), cuts it into optimizer
steps, and lets `hf_dflop.balance.assign` regroup the samples *within* each step. The set of samples of a step, the
number of microbatches of every rank and the number of steps never change.

The result is a pure function of (stock grouping, shapes, cost version of the step, seed, epoch, step): every rank
computes it alike, without communication.

Assumptions: every rank sees the same stock grouping (Trainer seeds its samplers alike on all ranks).
"""

import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import Assignment, assign, warm_up
from hf_dflop.cost import CostModel
from hf_dflop.data.dummies import Dummy, assign_filled
from hf_dflop.data.joined_rows import priced_by_row, sample_costs
from hf_dflop.data.lookahead import look_ahead
from hf_dflop.data.place import done_microbatches, place_of
from hf_dflop.data.step_plan import Caps, Microbatches, StepPlan
from hf_dflop.data.versions import CostVersion, CostVersions
from hf_dflop.data.windows import paired_steps
from hf_dflop.errors import BalanceError
from hf_dflop.shapes import Shapes

__all__ = ["BalancedBatchSampler"]

_REMEMBERED_STEPS = 1024
"""Plans kept for the log: more than the steps that loader workers can run ahead of the training loop."""

LOOK_AHEAD_STEPS = 4
"""Steps that are planned ahead, in a thread, while the loop trains."""


_WOULD_HANG = (
    "would leave the others waiting for ever. Use a larger global batch, for images "
    "VisionLanguageCollator(dummy_image=True), or under DDP ddp_find_unused_parameters=True."
)


class BalancedBatchSampler:
    """Yields the index list of each microbatch of one rank, balanced within each optimizer step.

    A drop-in for the batch sampler of a `DataLoader`: the same length, the same samples per step.

    Args:
        stock (`Callable[[], Sequence[Microbatches]]`):
            Called once per epoch; gives for every rank the stock index lists of the epoch, in order.
        shapes ([`Shapes`]):
            The shapes of the whole dataset, by dataset index.
        cost_model ([`CostModel`]):
            Shapes → seconds, until another version is declared in the attribute `costs`.
        rank (`int`), num_ranks (`int`):
            This data-parallel rank, and how many there are.
        num_slots (`int`):
            Microbatches per rank and step (`gradient_accumulation_steps`).
        length (`int`):
            Microbatches per rank and epoch.
        objective (`str`):
            What a step costs; one of `hf_dflop.balance.OBJECTIVES`.
        padded (`bool`):
            Whether the collator pads to the longest sample of the microbatch.
        caps ([`Caps`]):
            What a microbatch may hold at most.
        balance (`bool`):
            `False` keeps the stock grouping, and only predicts what balancing would bring.
        set_stock_epoch (`Callable[[int], None]`, *optional*):
            Tells the stock sampler the epoch before its grouping is read.
        seed (`int`):
            Seeds the search; the same on every rank.
        spread_images (`bool`):
            Every microbatch gets a sample with an image (or a sound), where there are enough and the caps allow it.
        fill_images (`bool`):
            Whether the collator adds an image to a microbatch without one. If not, `spread_images` is a must.
        look_ahead_steps (`int`):
            Steps planned ahead in a thread of their own; 0 plans each step when it is asked for. The plans are the
            same.
        window_steps (`int`):
            With more than 1, giant samples are paired across so many consecutive steps, see
            [`~hf_dflop.balance.pair_giants`]: steps are then not those of the stock run.
        oversize (`str`):
            A sample above a cap is an `"error"`, or runs `"alone"`.
        samples_per_step (`int`, *optional*):
            Samples of a full step, for `state_dict`.
        all_pairs (`bool`):
            Attention computes all pairs of tokens of a packed microbatch, also those of different samples (SDPA,
            eager); see `hf_dflop.data.joined_rows`.
        dummy ([`Dummy`], *optional*):
            What the row costs that the collator adds to a microbatch without an image.
    """

    def __init__(
        self,
        stock: Callable[[], Sequence[Microbatches]],
        shapes: Shapes,
        cost_model: CostModel,
        *,
        rank: int,
        num_ranks: int,
        num_slots: int,
        length: int,
        objective: str,
        padded: bool,
        caps: Caps,
        balance: bool = True,
        set_stock_epoch: Callable[[int], None] | None = None,
        seed: int = 0,
        spread_images: bool = False,
        fill_images: bool = False,
        look_ahead_steps: int = LOOK_AHEAD_STEPS,
        window_steps: int = 1,
        oversize: str = "error",
        samples_per_step: int | None = None,
        all_pairs: bool = False,
        dummy: Dummy | None = None,
    ) -> None:
        if window_steps < 1:
            raise BalanceError(f"window_steps is {window_steps}; 1 keeps the steps, more pair giants across so many")
        # No attribute may be called `sampler`: accelerate would reach through it and set the wrong epoch.
        self._stock = stock
        self._set_stock_epoch = set_stock_epoch
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_slots = num_slots
        self._length = length
        self.objective = objective
        self._padded = padded
        self._caps = caps
        self._balance = balance
        self._seed = seed
        self._look_ahead_steps = look_ahead_steps
        self.costs = CostVersions(shapes, cost_model, padded=padded, all_pairs=all_pairs)
        self._window_steps = window_steps if balance else 1
        self._oversize = oversize
        self._cut: dict[str, Any] = {
            "num_slots": num_slots,
            "samples_per_step": samples_per_step,
            "dataset": shapes.fingerprint(),
        }
        self._dummy = dummy
        self._tokens = shapes.llm_tokens
        self._patches = shapes.encoder_inputs
        self._has_image = shapes.feeds_encoders
        self._needed = shapes.needed_media
        self._spread_images = spread_images
        self._must_spread = spread_images and not fill_images
        self._plans: OrderedDict[tuple[int, int], StepPlan] = OrderedDict()
        self.epoch = 0
        self.resume_step = 0
        self._first_microbatch = 0
        self._num_yielded = 0
        # accelerate reads these two of any batch sampler.
        self.batch_size: int | None = None
        self.drop_last = False

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs."""
        if epoch != self.epoch:
            self.resume_step = self._first_microbatch = self._num_yielded = 0
        self.epoch = epoch
        if self._set_stock_epoch is not None:
            self._set_stock_epoch(epoch)

    def skip_to(self, step: int) -> None:
        """Do not plan the steps of this epoch before `step`: a resumed run throws them away unread."""
        self.resume_step = step

    def plan_of(self, epoch: int, step: int) -> StepPlan | None:
        """The plan of an optimizer step (counted within its epoch), if it was made and is still remembered."""
        return self._plans.get((epoch, step))

    def microbatch_s(self, microbatch: Sequence[int], version: CostVersion | None = None) -> float:
        """Predicted seconds of a microbatch of these dataset indices, under a cost version or the newest one."""
        version = version or self.costs.newest
        return float(self.costs.module_seconds([microbatch], version).sum()) + version.model.per_microbatch_s

    def position(self, epoch: int, step: int) -> int:
        """The number of an optimizer step, counted from the start of the training."""
        return epoch * -(-self._length // self._num_slots) + step

    def state_dict(self, num_microbatches: int | None = None) -> dict[str, Any]:
        """Where this epoch stands, for `load_state_dict`; plain JSON types.

        Args:
            num_microbatches (`int`, *optional*):
                Microbatches of this rank that were trained on in this epoch. By default those that were handed out,
                which loader workers may have fetched ahead of training.
        """
        done = self._num_yielded if num_microbatches is None else num_microbatches
        return place_of(epoch=self.epoch, done=done, **self._cut)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, also on another number of ranks; nothing before it is handed out again.

        Raises:
            DatasetError: the state is of another dataset.
            BalanceError: steps had another number of samples, or the state lies within a step that is cut otherwise
                now.
        """
        self._first_microbatch = self._num_yielded = done_microbatches(state, **self._cut)
        self.epoch = state["epoch"]
        self.resume_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        begin, self._first_microbatch = self._first_microbatch, 0
        self._num_yielded = begin
        for microbatch in itertools.islice(self._microbatches(begin), begin % self._num_slots, None):
            self._num_yielded += 1
            yield microbatch

    def _microbatches(self, begin: int) -> Iterator[list[int]]:
        """The microbatches of the epoch from the step on that holds the one with number `begin`."""
        epoch = self.epoch
        if self._set_stock_epoch is not None:
            self._set_stock_epoch(epoch)
        ranks = self._stock()
        num_steps = -(-len(ranks[self._rank]) // self._num_slots)
        if self._must_spread:
            self._check_epoch(ranks, epoch, num_steps)
        skipped = min(begin // self._num_slots, num_steps)
        first = max(min(self.resume_step, num_steps), skipped)
        for step in range(skipped, first):  # thrown away by a resumed run
            yield from (list(microbatch) for microbatch in self._stock_of(ranks, step)[self._rank])

        window: dict[int, list[Microbatches]] = {}

        def plan(step: int) -> StepPlan | None:
            if self._window_steps > 1 and step not in window:
                window.clear()
                window.update(self._paired(ranks, step, num_steps))
            stock = window.get(step) or self._stock_of(ranks, step)
            # At an epoch's end with even_batches=False, ranks have different numbers of microbatches: there the stock
            # grouping is the only one that keeps them.
            if len({len(slots) for slots in stock}) > 1:
                self._check_spread(stock, epoch, step)
                return None
            return self.plan(stock, epoch, step)

        def planned() -> Iterator[int]:
            for step in range(first, num_steps):
                self.costs.planned_through = self.position(epoch, step)
                yield step

        steps = range(first, num_steps)
        with contextlib.closing(look_ahead(plan, planned(), depth=self._look_ahead_steps)) as plans:
            for step, (made, wait_s) in zip(steps, plans, strict=True):
                if made is None:
                    yield from (list(microbatch) for microbatch in self._stock_of(ranks, step)[self._rank])
                    continue
                self._plans[epoch, step] = replace(made, scheduling_wait_s=wait_s)
                if len(self._plans) > _REMEMBERED_STEPS:
                    self._plans.popitem(last=False)
                yield from made.microbatches(self._rank)

    def _stock_of(self, ranks: Sequence[Microbatches], step: int) -> list[Microbatches]:
        """The stock microbatches of one step, rank by rank."""
        begin = step * self._num_slots
        return [slots[begin : begin + self._num_slots] for slots in ranks]

    def _paired(self, ranks: Sequence[Microbatches], step: int, num_steps: int) -> dict[int, list[Microbatches]]:
        """The steps of the window of `step`, giants paired."""
        begin = step - step % self._window_steps
        steps = range(begin, min(begin + self._window_steps, num_steps))
        # By the costs that training began with: a version must not cut a window in two.
        seconds = self.costs.first_seconds()
        paired = paired_steps([self._stock_of(ranks, step) for step in steps], seconds, self._num_ranks)
        return dict(zip(steps, paired, strict=True))

    def has_image(self, plan: StepPlan) -> bool:
        """Whether any sample of the step has an image (or a sound)."""
        return plan.has_image

    def warm_up(self) -> None:
        """Compile what planning needs, before the first step."""
        warm_up(objective=self.objective, padded=self._padded)

    def plan(self, stock: Sequence[Microbatches], epoch: int, step: int) -> StepPlan:
        """Group the samples of one step; `stock` has, for each rank, its stock microbatches."""
        begin = time.perf_counter()
        indices = np.array([index for slots in stock for group in slots for index in group], dtype=np.int64)
        positions = iter(range(indices.size))
        baseline = [[[next(positions) for _ in group] for group in slots] for slots in stock]
        version = self.costs.at(self.position(epoch, step))
        assignment = self._assign(indices, baseline, epoch, step, version)
        if self._must_spread and not assignment.is_spread:
            groups = [group for slots in assignment.groups for group in slots]
            self._check_spread([[indices[group].tolist() for group in groups]], epoch, step)
        return StepPlan(
            epoch=epoch,
            step=step,
            assignment=assignment,
            indices=indices,
            stock=stock,
            balanced=self._balance,
            cost_version=version,
            scheduling_s=time.perf_counter() - begin,
            has_image=bool(self._has_image[indices].any()),
        )

    def _assign(
        self, indices: npt.NDArray[np.int64], baseline: Any, epoch: int, step: int, version: CostVersion
    ) -> Assignment:
        tokens, patches = self._tokens[indices], self._patches[indices]
        num_slots = len(baseline[0])
        vision_s, llm_s = self.costs.seconds(indices, version)
        row_cost = self.costs.row_cost(version)
        if row_cost is not None:
            llm_s = sample_costs(row_cost, tokens, self._num_ranks * num_slots)
        arguments: dict[str, Any] = {
            "vision_s": vision_s,
            "llm_s": llm_s,
            "num_ranks": self._num_ranks,
            "num_slots": num_slots,
            "objective": self.objective,
            "padded": self._padded,
            "baseline": baseline,
            "tokens": tokens,
            "max_tokens": self._caps.max_tokens,
            "patches": patches,
            "max_patches": self._caps.max_patches,
            "spread": self._has_image[indices] if self._spread_images else None,
            "oversize": self._oversize,
            "rank_speeds": version.rank_speeds,
            "seed": (self._seed * 1_000_003 + epoch * 8_191 + step) % 2**31,
        }
        dummy = None if self._dummy is None else self.costs.dummy(self._dummy, version)
        try:
            found = (assign_filled(arguments, dummy) if self._spread_images else None) or assign(**arguments)
        except BalanceError as error:
            raise BalanceError(f"epoch {epoch}, step {step}, samples {indices.tolist()[:16]}...: {error}") from error
        if row_cost is None:
            return found
        fits = not self._spread_images and all(
            cap is None or int(counts[group].sum()) <= cap
            for counts, cap in ((tokens, self._caps.max_tokens), (patches, self._caps.max_patches))
            for slots in baseline
            for group in slots
        )
        return priced_by_row(
            found, row_cost, vision_s, tokens, baseline, may_keep=fits, rank_speeds=version.rank_speeds
        )

    def _check_epoch(self, ranks: Sequence[Microbatches], epoch: int, num_steps: int) -> None:
        """Raise before the epoch begins, rather than at the step that has too few images."""
        for step in range(self.resume_step, num_steps):
            groups = [group for slots in self._stock_of(ranks, step) for group in slots]
            num_images = int(self._has_image[list(itertools.chain.from_iterable(groups))].sum())
            if num_images < len(groups):
                raise BalanceError(
                    f"epoch {epoch}, step {step} has {num_images} samples with {self._needed} for {len(groups)} "
                    f"microbatches: a rank without one {_WOULD_HANG}"
                )

    def _check_spread(self, stock: list[Microbatches], epoch: int, step: int) -> None:
        bare = next((group for slots in stock for group in slots if not self._has_image[list(group)].any()), None)
        if self._must_spread and bare is not None:
            raise BalanceError(
                f"epoch {epoch}, step {step}: no sample of the microbatch {list(bare)[:16]} has {self._needed}, and "
                f"nothing else fits into the caps or the end of the epoch; its rank {_WOULD_HANG}"
            )
