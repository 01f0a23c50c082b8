"""What each rank of a pipeline loads, microbatch by microbatch, in the stock order.

In: the stock grouping of an epoch (what as many data-parallel processes as the LLM has replicas would load), shapes, a
plan. Out: a `DataLoader` with one item per microbatch *slot*: that microbatch of every replica, of which this rank
builds its own inputs alone. As long as the stock dataloader, so that Trainer counts steps, epochs and what to skip as
ever.

Assumptions: rows are read by index; the same arguments on every rank give the same plans.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset

from hf_dflop.cost import CostModel, ModelSpec, Trainable
from hf_dflop.data import PackedCollator, VisionLanguageCollator
from hf_dflop.data.lookahead import look_ahead
from hf_dflop.data.sampler import LOOK_AHEAD_STEPS, BalancedBatchSampler
from hf_dflop.data.step_plan import stock_caps
from hf_dflop.errors import TrainerError
from hf_dflop.integrations.stock import StockSharding
from hf_dflop.pipeline import MicrobatchShape, PipelineModel, StepBatch, StepShape, Topology, build_batch
from hf_dflop.pipeline.batch import Sample
from hf_dflop.plan import Plan
from hf_dflop.profile.source import undecoded
from hf_dflop.shapes import Shapes

__all__ = [
    "CallSampler",
    "Slot",
    "SlotRows",
    "SlotSampler",
    "join_slots",
    "make_balancer",
    "make_slots",
    "slot_loader",
    "stock_sharding",
]

Indices = list[list[list[int]]]
"""Dataset indices: replica → slot → samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One microbatch of every LLM replica."""

    samples: tuple[tuple[int, ...], ...]
    """Dataset indices of each replica."""
    label_tokens: int
    """Of the whole optimizer step."""


def stock_sharding(
    loader: DataLoader, replicas: int, accelerator: Any, *, even: bool, data_seed: int | None = None
) -> StockSharding:
    """How accelerate would deal the batches of `loader` to `replicas` data-parallel processes.

    Args:
        even (`bool`): fill the last round with samples from the start, if accelerate is told to; else leave it uneven.
        data_seed (`int`, *optional*): seeds a random order; by default what accelerate would take.
    """
    settings = accelerator.dataloader_config
    prepared = prepare_data_loader(
        loader,
        num_processes=replicas,
        process_index=0,
        split_batches=accelerator.split_batches,
        put_on_device=False,
        dispatch_batches=False,
        even_batches=even and accelerator.even_batches,
        use_seedable_sampler=True,
        data_seed=settings.data_seed if data_seed is None else data_seed,
    )
    return StockSharding(prepared.batch_sampler)


class _PlannedCosts:
    """A cost model whose encoder and LLM seconds are those of the largest stage of each in a plan."""

    def __init__(self, cost_model: CostModel, plan: Plan, shapes: Shapes) -> None:
        self._model, self._shapes = cost_model, shapes
        self.rates = cost_model.rates
        self.per_microbatch_s = cost_model.per_microbatch_s
        self._own = plan.placement == "disjoint"
        # An encoder replica serves llm.dp ÷ vision.dp replicas of the LLM.
        share = max(plan.llm.layers) * plan.llm.num_chunks / max(plan.llm.num_layers, 1)
        encoder_share = max(plan.vision.layers) / max(plan.vision.num_layers, 1)
        self._weight = plan.llm.dp / plan.vision.dp * encoder_share / share if self._own else 1.0

    def vision_s(self, shapes: Shapes) -> Any:
        seconds = self._model.vision_s(shapes)
        return seconds * self._weight if self._own else np.zeros_like(seconds)

    def llm_s(self, shapes: Shapes) -> Any:
        # Colocated, the encoder and the LLM's first stage take turns on one rank.
        seconds = self._model.llm_s(shapes)
        return seconds if self._own else seconds + self._model.vision_s(shapes)

    def vision_work(self, shapes: Shapes) -> Any:
        """See `CostModel.vision_work`; all in the first column."""
        return np.outer(self.vision_s(shapes) * self.rates.vision_linear, [1.0, 0.0])

    def llm_work(self, tokens: Any) -> Any:
        """See `CostModel.llm_work`; for the samples of the dataset alone, whose images may count too."""
        assert np.array_equal(tokens, self._shapes.llm_tokens)
        return np.outer(self.llm_s(self._shapes) * self.rates.llm_linear, [1.0, 0.0])


def make_balancer(
    shapes: Shapes, sharding: StockSharding, plan: Plan, cost_model: CostModel, *, slots: int, padded: bool, seed: int
) -> BalancedBatchSampler:
    """Composes the microbatches of a step for the pipeline."""
    costs: Any = _PlannedCosts(cost_model, plan, shapes)
    return BalancedBatchSampler(
        sharding.epoch_groups,
        shapes,
        costs,
        rank=0,
        num_ranks=sharding.num_ranks,
        num_slots=slots,
        length=sharding.length,
        objective="pipeline",
        padded=padded,
        caps=stock_caps(shapes, sharding.microbatch_size),
        seed=seed,
    )


def make_slots(
    stock: DataLoader,
    pipe: PipelineModel,
    accelerator: Any,
    collator: Any,
    *,
    slots: int,
    training: bool,
    cost_model: CostModel | None = None,
    seed: int = 0,
    data_seed: int | None = None,
) -> "tuple[SlotRows, SlotSampler]":
    """What a rank of a pipeline loads instead of `stock`, the loader of one data-parallel process.

    Args:
        slots (`int`): microbatches of a replica and step.
        training (`bool`): regroup the samples of a step by cost, if the plan says so.

    Raises:
        TrainerError: too few samples for one microbatch of each replica, or samples with sounds.
    """
    plan, shapes = pipe.plan, Shapes.of_dataset(stock.dataset)
    if num_sounds := int((shapes.num_audios > 0).sum()):
        raise TrainerError(
            f"{num_sounds} samples have sounds, and a pipeline runs images and videos alone: drop them, or use "
            "Trainer with DflopCallback."
        )
    sharding = stock_sharding(stock, plan.llm.dp, accelerator, even=training, data_seed=data_seed)
    if not sharding.length:
        raise TrainerError(
            f"{len(shapes)} samples fill no microbatch of {sharding.microbatch_size} on {plan.llm.dp} replicas: use "
            "smaller ones, or more data."
        )
    balancer = None
    if training and plan.balance and plan.llm.dp * slots > 1:
        balancer = make_balancer(
            shapes,
            sharding,
            plan,
            cost_model or _analytic_costs(pipe),
            slots=slots,
            padded=not isinstance(collator, PackedCollator),
            seed=seed,
        )
    rows = SlotRows(stock.dataset, shapes, collator, pipe.topology, pipe.place.rank)
    return rows, SlotSampler(sharding, shapes, slots=slots, balancer=balancer)


def _analytic_costs(pipe: PipelineModel) -> CostModel:
    frozen = pipe.plan.frozen
    trainable = Trainable(vision="vision" not in frozen, connector="connector" not in frozen, llm="llm" not in frozen)
    return CostModel.analytic(ModelSpec.from_config(pipe.config), trainable=trainable)


class SlotSampler(BatchSampler):
    """Yields the slots of an epoch, each in a list of its own.

    Args:
        sharding ([`StockSharding`]): the stock order.
        shapes ([`Shapes`]): of the dataset.
        slots (`int`): microbatches of a replica and step.
        balancer ([`BalancedBatchSampler`], *optional*): regroups the samples of each step; else the stock grouping.
    """

    def __init__(
        self,
        sharding: StockSharding,
        shapes: Shapes,
        *,
        slots: int,
        balancer: BalancedBatchSampler | None = None,
    ) -> None:
        self._sharding = sharding
        self._label_tokens = shapes.label_tokens
        self._slots = slots
        self._balancer = balancer
        self._epoch = 0
        self.batch_size = 1
        self.drop_last = False

    @property
    def batch_sampler(self) -> "SlotSampler":
        """Trainer sets the epoch of a dataloader on `batch_sampler.batch_sampler`, where accelerate keeps the own."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._sharding.length

    def __iter__(self) -> Iterator[list[Slot]]:
        epoch = self._epoch
        self._sharding.set_epoch(epoch)
        ranks = self._sharding.epoch_groups()
        steps = range(-(-len(self) // self._slots))
        depth = LOOK_AHEAD_STEPS if self._balancer is not None else 0
        for groups, _ in look_ahead(lambda step: self._groups(ranks, epoch, step), steps, depth=depth):
            indices = [index for slots in groups for group in slots for index in group]
            label_tokens = int(self._label_tokens[indices].sum())
            for slot in range(max(len(slots) for slots in groups)):
                # At an epoch's end a replica may have fewer microbatches than the others.
                samples = tuple(tuple(slots[slot]) if slot < len(slots) else () for slots in groups)
                yield [Slot(samples=samples, label_tokens=label_tokens)]

    def _groups(self, ranks: Sequence[Any], epoch: int, step: int) -> Indices:
        begin = step * self._slots
        stock = [[list(group) for group in slots[begin : begin + self._slots]] for slots in ranks]
        if self._balancer is None or len({len(slots) for slots in stock}) > 1:
            return stock
        made = self._balancer.plan(stock, epoch, step)
        return [made.microbatches(rank) for rank in range(len(stock))]


class CallSampler(BatchSampler):
    """Yields the slots of one call of a pipeline; its epoch is set as accelerate's loaders do.

    Args:
        sampler ([`SlotSampler`]): the slots of an epoch; a step has a multiple of `size` of them.
        size (`int`): microbatches of a call.
    """

    def __init__(self, sampler: SlotSampler, size: int) -> None:
        self.sampler = sampler
        self.batch_size = size
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        call: list[Slot] = []
        for slot in self.sampler:
            call += slot
            if len(call) == self.batch_size:
                yield call
                call = []
        if call:
            yield call


class SlotRows(Dataset):
    """Builds this rank's inputs of a slot: LLM ranks never decode images, encoder ranks build no other's samples."""

    def __init__(self, rows: Any, shapes: Shapes, collator: Any, topology: Topology, rank: int) -> None:
        self._topology, self._rank = topology, rank
        self._packed = isinstance(collator, PackedCollator)
        inner = collator.collator if isinstance(collator, PackedCollator) else collator
        self._multiple = getattr(inner, "pad_to_multiple_of", None) or 1
        self._collate_vision: Callable[..., Any] = inner
        self._collate_text: Callable[..., Any] = inner
        if isinstance(inner, VisionLanguageCollator):
            rows = _undecoded(rows)
            self._collate_text = inner.without_pixels
        if isinstance(collator, PackedCollator):
            self._collate_text = partial(_pack, collator, self._collate_text)
        self._rows = rows
        self._llm_tokens, self._image_tokens = shapes.llm_tokens, shapes.image_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, slot: Slot) -> StepBatch:
        shape = StepShape(
            microbatches=(tuple(self._shape(samples) for samples in slot.samples),), label_tokens=slot.label_tokens
        )
        text, vision = (
            partial(self._collate, slot, self._collate_text),
            partial(self._collate, slot, self._collate_vision),
        )
        batch = build_batch(shape, self._topology, self._rank, text, vision)
        return replace(batch, samples=(tuple(tuple(map(int, samples)) for samples in slot.samples),))

    def _shape(self, samples: Sequence[int]) -> MicrobatchShape:
        picked = list(samples)
        return MicrobatchShape.of(
            self._llm_tokens[picked].tolist(),
            self._image_tokens[picked].tolist(),
            packed=self._packed,
            pad_to_multiple_of=self._multiple,
        )

    def _collate(self, slot: Slot, collate: Callable[..., Any], samples: Sequence[Sample]) -> Any:
        return collate([self._rows[slot.samples[replica][place]] for _, replica, place in samples])


def _pack(collator: PackedCollator, collate: Callable[..., Any], samples: Sequence[Any]) -> Any:
    return collator.pack(collate(samples))


def _undecoded(rows: Any) -> Any:
    """The same rows with images as bytes or paths; what has a format or transform of its own stays as it is."""
    import datasets

    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None:
        return rows
    info = copy.deepcopy(rows.info)
    info.features = datasets.Features({name: undecoded(feature) for name, feature in rows.features.items()})
    return datasets.Dataset(rows.data, info=info, split=rows.split, indices_table=rows._indices)


def slot_loader(rows: SlotRows, sampler: SlotSampler, args: Any, *, training: bool) -> DataLoader:
    """A dataloader of slots with Trainer's loader settings."""
    from transformers.trainer_utils import seed_worker

    workers = args.dataloader_num_workers
    return DataLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=_only,
        num_workers=workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index) if training else None,
    )


def _only(items: Sequence[StepBatch]) -> StepBatch:
    (item,) = items
    return item


def join_slots(slots: Sequence[StepBatch], *, label_tokens: int | None = None) -> StepBatch:
    """The microbatches of several slots in one call; `label_tokens` instead of the step's divides the loss."""
    tokens = slots[0].shape.label_tokens if label_tokens is None else label_tokens
    microbatches = tuple(microbatch for slot in slots for microbatch in slot.shape.microbatches)
    return StepBatch(
        shape=StepShape(microbatches=microbatches, label_tokens=tokens),
        text=tuple(text for slot in slots for text in slot.text),
        vision=tuple(vision for slot in slots for vision in slot.vision),
        samples=tuple(microbatch for slot in slots for microbatch in slot.samples),
    )
