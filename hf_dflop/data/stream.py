"""Balanced microbatches from a stream: a look-ahead of one global batch, grouped, and dealt to ranks and workers.

Takes an annotated stream (rows carry their shape columns) in the order in which the stock run would read it, collects
the rows of one optimizer step (or of a window of steps), and groups them as `BalancedBatchSampler` does. The samples
of a step are the stock run's; what is left at the end of the stream and fills no step is left out.

Every rank and every loader worker reads all rows, undecoded, and decodes only those that it yields: nobody has to
talk, and the result depends neither on the number of workers nor on timing. Where a stream is read over a network,
that is its price.

In: rows. Out: microbatches (lists of rows) of one rank. For `DataLoader(stream, batch_size=None, collate_fn=collate)`.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_dflop.balance import assign, warm_up
from hf_dflop.cost import CostModel
from hf_dflop.data.place import done_microbatches, place_of
from hf_dflop.data.rows_of_stream import Row, RowReader
from hf_dflop.data.step_plan import Caps, StepPlan
from hf_dflop.data.windows import paired_steps
from hf_dflop.errors import BalanceError, DatasetError
from hf_dflop.shapes import NEEDED_COLUMNS, SHAPE_COLUMNS, Shapes

__all__ = ["BalancedStream"]

_REMEMBERED_STEPS = 64


class BalancedStream(IterableDataset):
    """Yields the microbatches of one rank, each a list of rows, balanced within each optimizer step.

    Args:
        source (`datasets.IterableDataset` or `Sequence` of them):
            The annotated stream that [`profile_dataset`] returned, read by all ranks in turns of a microbatch; or one
            stream per rank, when the stock run gives every rank shards of its own.
        cost_model ([`CostModel`]): shapes → seconds.
        rank (`int`), num_ranks (`int`): this data-parallel rank, and how many there are.
        num_slots (`int`): microbatches per rank and step (`gradient_accumulation_steps`).
        batch_size (`int`): samples of a stock microbatch of one rank.
        objective (`str`, defaults to `"step"`): what a step costs; one of `hf_dflop.balance.OBJECTIVES`.
        padded (`bool`, defaults to `True`): whether the collator pads to the longest sample of the microbatch.
        caps ([`Caps`], *optional*):
            What a microbatch may hold at most. What is not given follows from each step: `batch_size` samples as
            large as the largest one in it.
        balance (`bool`, defaults to `True`): `False` keeps the stock grouping.
        spread_images (`bool`, defaults to `False`): every microbatch gets a sample with an image.
        fill_images (`bool`, defaults to `False`): the collator adds an image to a microbatch without one.
        oversize (`str`, defaults to `"error"`): a sample above a cap is an error, or runs `"alone"`.
        window_steps (`int`, defaults to 1): giants are paired across so many steps; see the callback.
        seed (`int`, defaults to 0): seeds the search; the same on every rank.

    Example:
        >>> stream = BalancedStream(ds, cost, rank=0, num_ranks=2, num_slots=4, batch_size=2)   # doctest: +SKIP
        >>> loader = DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=2)      # doctest: +SKIP
    """

    def __init__(
        self,
        source: Any,
        cost_model: CostModel,
        *,
        rank: int,
        num_ranks: int,
        num_slots: int,
        batch_size: int,
        objective: str = "step",
        padded: bool = True,
        caps: Caps | None = None,
        balance: bool = True,
        spread_images: bool = False,
        fill_images: bool = False,
        oversize: str = "error",
        window_steps: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sources = list(source) if isinstance(source, (list, tuple)) else [source]
        if len(sources) not in (1, num_ranks):
            raise ValueError(f"{len(sources)} streams for {num_ranks} ranks; give one, or one per rank")
        if min(num_ranks, num_slots, batch_size, window_steps) < 1 or not 0 <= rank < num_ranks:
            raise ValueError(
                f"rank={rank}, num_ranks={num_ranks}, num_slots={num_slots}, batch_size={batch_size}, "
                f"window_steps={window_steps}; a rank below num_ranks and numbers of at least 1 are needed"
            )
        self._readers = [RowReader(one) for one in sources]
        self._cost_model = cost_model
        self._rank, self._num_ranks, self._num_slots, self._batch_size = rank, num_ranks, num_slots, batch_size
        self.objective = objective
        self._padded = padded
        self._caps = caps or Caps()
        self._balance = balance
        self._spread_images = spread_images
        self._must_spread = spread_images and not fill_images
        self._oversize = oversize
        self._window_steps = window_steps if balance else 1
        self._seed = seed
        # Epoch, first microbatch, empty microbatches before it: shared, since persistent workers are not made anew.
        self._position = torch.zeros(3, dtype=torch.int64).share_memory_()
        # What `load_state_dict` was given: (epoch, first microbatch, the one that worker 0 begins with).
        self._loaded: tuple[int, int, int] | None = None
        self._epoch_offset = 0
        self._num_passed = 0
        self._plans: OrderedDict[tuple[int, int], StepPlan] = OrderedDict()

    @property
    def samples_per_step(self) -> int:
        return self._num_ranks * self._num_slots * self._batch_size

    @property
    def epoch(self) -> int:
        """The epoch of the stream that the next iteration runs."""
        return int(self._position[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs; the source is told, too (its shuffling may depend on it)."""
        epoch += self._epoch_offset
        if epoch != int(self._position[0]):
            self._position[:] = torch.tensor([epoch, 0, 0])
            self._loaded = None
            self._num_passed = 0
        self._tell_epoch(epoch)

    def _tell_epoch(self, epoch: int) -> None:
        for reader in self._readers:
            reader.set_epoch(epoch)

    def resume(self, epoch: int, step: int, num_empty: int) -> None:
        """Begin the loop's epoch 0 at `step` of `epoch`, after `num_empty` empty microbatches that are thrown away."""
        self._epoch_offset = epoch
        self._position[:] = torch.tensor([epoch, step * self._num_slots, num_empty])
        self._tell_epoch(epoch)

    def state_dict(self, num_microbatches: int | None = None) -> dict[str, Any]:
        """Where this epoch stands, for `load_state_dict`; plain JSON types.

        Args:
            num_microbatches (`int`, *optional*):
                Microbatches of this rank that were trained on in this epoch. By default those that this process read,
                as `StatefulDataLoader` asks for in each of its workers.
        """
        done = self._num_passed if num_microbatches is None else num_microbatches
        return place_of(
            epoch=self.epoch, done=done, num_slots=self._num_slots, samples_per_step=self.samples_per_step,
            dataset=None,
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, also on another number of ranks. Rows before it are read, but not decoded.

        Raises:
            BalanceError: steps had another number of samples, or the state lies within a step that is cut otherwise.
        """
        done = done_microbatches(
            state, num_slots=self._num_slots, samples_per_step=self.samples_per_step, dataset=None
        )
        if get_worker_info() is None:
            self._position[:] = torch.tensor([state["epoch"], done, 0])
        # A StatefulDataLoader gives every worker its own state back, and goes on with the worker that is next.
        self._loaded = (state["epoch"], done, done if get_worker_info() is None else 0)
        self._num_passed = done

    def plan_of(self, epoch: int, step: int) -> StepPlan | None:
        """The plan of a step, if this process made it and still remembers it; `epoch` as in `set_epoch`."""
        return self._plans.get((epoch + self._epoch_offset, step))

    def microbatch_s(self, microbatch: Sequence[int]) -> float:
        """Predicted seconds are not kept by row: nan."""
        return float("nan")

    def has_image(self, plan: StepPlan) -> bool:
        """Whether any sample of the step has an image (or a sound)."""
        return plan.has_image

    def warm_up(self) -> None:
        """Compile what planning needs, before the first step."""
        warm_up(objective=self.objective, padded=self._padded)

    def __iter__(self) -> Iterator[list[Row]]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch, first, num_empty = self._position.tolist()
        begin = first - num_empty
        if self._loaded is not None:
            (epoch, first, begin), num_empty = self._loaded, 0
            self._loaded = None
        if worker is None:
            self._position[1:] = 0
        for turn in range(num_empty):  # this worker's are every num_workers-th of those that are handed out
            if turn % num_workers == number:
                yield []
        self._num_passed = first
        for step, rows, plan in self._steps(epoch, first // self._num_slots):
            groups = plan.microbatches(self._rank)
            for slot in range(self._num_slots):
                microbatch = step * self._num_slots + slot
                if microbatch < first:
                    continue
                self._num_passed = microbatch + 1
                if (microbatch - begin) % num_workers == number:
                    yield [self._readers[0].decoded(rows[index]) for index in groups[slot]]

    def _steps(self, epoch: int, first_step: int) -> Iterator[tuple[int, dict[int, Row], StepPlan]]:
        """Number, rows (by their number in the epoch) and plan of each step from `first_step` on."""
        begin = first_step - first_step % self._window_steps
        streams = [reader.rows(epoch) for reader in self._readers]
        for stream in streams:  # what a resumed run has seen
            for _ in itertools.islice(stream, begin * self.samples_per_step // len(streams)):
                pass
        for window in itertools.count(begin, self._window_steps):
            rows: dict[int, Row] = {}
            stock: list[list[list[list[int]]]] = []
            for step in range(window, window + self._window_steps):
                read = self._read_step(streams)
                if read is None:
                    break
                offset = step * self.samples_per_step
                rows |= {offset + number: row for number, row in enumerate(read)}
                stock.append(self._deal(offset))
            if not stock:
                return
            shapes = self._shapes(rows)
            if len(stock) > 1:
                seconds = self._cost_model.vision_s(shapes) + self._cost_model.llm_s(shapes)
                stock = paired_steps(stock, seconds, self._num_ranks, first_index=window * self.samples_per_step)
            for step, groups in enumerate(stock, window):
                if step >= first_step:
                    yield step, rows, self._plan(groups, shapes, window, epoch, step)

    def _read_step(self, streams: Sequence[Iterator[Row]]) -> list[Row] | None:
        share = self.samples_per_step // len(streams)
        read = [row for stream in streams for row in itertools.islice(stream, share)]
        return read if len(read) == self.samples_per_step else None

    def _deal(self, offset: int) -> list[list[list[int]]]:
        """The stock grouping of the step whose first row has number `offset`: rank → slot → row numbers."""
        numbers = offset + np.arange(self.samples_per_step)
        if len(self._readers) > 1:
            return numbers.reshape(self._num_ranks, self._num_slots, self._batch_size).tolist()
        return numbers.reshape(self._num_slots, self._num_ranks, self._batch_size).swapaxes(0, 1).tolist()

    def _shapes(self, rows: dict[int, Row]) -> Shapes:
        missing = next((name for row in rows.values() for name in NEEDED_COLUMNS if name not in row), None)
        if missing is not None:
            raise DatasetError(
                f"a row of the stream has no shape column {missing!r}: the stream was not annotated. Use the stream "
                "that hf_dflop.profile_dataset returns."
            )
        return Shapes.from_columns({name: [int(row.get(name, 0)) for row in rows.values()] for name in SHAPE_COLUMNS})

    def _plan(self, stock: list[list[list[int]]], shapes: Shapes, window: int, epoch: int, step: int) -> StepPlan:
        begin = time.perf_counter()
        indices = np.array([index for slots in stock for group in slots for index in group], dtype=np.int64)
        own = shapes.select(indices - window * self.samples_per_step)
        counter = itertools.count()
        baseline = [[[next(counter) for _ in group] for group in slots] for slots in stock]
        has_image = own.feeds_encoders
        caps = self._caps
        try:
            assignment = assign(
                self._cost_model.vision_s(own),
                self._cost_model.llm_s(own),
                num_ranks=self._num_ranks,
                num_slots=self._num_slots,
                objective=self.objective,
                padded=self._padded,
                baseline=baseline,
                tokens=own.llm_tokens,
                max_tokens=caps.max_tokens or self._batch_size * int(own.llm_tokens.max()),
                patches=own.encoder_inputs,
                max_patches=caps.max_patches or max(self._batch_size * int(own.encoder_inputs.max()), 1),
                spread=has_image if self._spread_images else None,
                oversize=self._oversize,
                seed=(self._seed * 1_000_003 + epoch * 8_191 + step) % 2**31,
            )
        except BalanceError as error:
            raise BalanceError(f"epoch {epoch}, step {step}, rows {indices.tolist()[:16]}...: {error}") from error
        if self._must_spread and not assignment.is_spread:
            raise BalanceError(
                f"epoch {epoch}, step {step} has {int(has_image.sum())} samples with {own.needed_media} for "
                f"{self._num_ranks * self._num_slots} microbatches: a rank without one would leave the others waiting "
                "for ever. Use a larger global batch, for images VisionLanguageCollator(dummy_image=True), or under "
                "DDP ddp_find_unused_parameters=True."
            )
        plan = StepPlan(
            epoch=epoch,
            step=step,
            assignment=assignment,
            indices=indices,
            stock=[list(slots) for slots in stock],
            balanced=self._balance,
            scheduling_s=time.perf_counter() - begin,
            scheduling_wait_s=time.perf_counter() - begin,
            has_image=bool(has_image.any()),
        )
        self._plans[epoch, step] = plan
        if len(self._plans) > _REMEMBERED_STEPS:
            self._plans.popitem(last=False)
        return plan
