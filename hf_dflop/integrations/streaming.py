"""Puts a balanced stream under a Trainer that trains on an `IterableDataset`.

In: the prepared dataloader of a streaming run. Out: the same dataloader, reading microbatches of a `BalancedStream`.

Whose rows a step has is read from how accelerate prepared the stream: shards of its own for every rank (a
`datasets.IterableDataset` with enough shards), or all rows dealt in turns. With loader workers the stock run mixes
shards by worker; here the steps are those without workers, whatever their number.

Assumptions: the rows at the beginning are like the others, where the collator and the model are tried on some.
"""

from itertools import islice
from types import SimpleNamespace
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import IterableDataset

from hf_dflop._compat import replace_stream
from hf_dflop.cost import CostModel
from hf_dflop.data.rows_of_stream import RowReader
from hf_dflop.data.step_plan import Caps
from hf_dflop.data.stream import BalancedStream
from hf_dflop.errors import DatasetError, TrainerError
from hf_dflop.integrations.checks import (
    adds_dummy_images,
    check_packed_samples,
    check_samples,
    needs_image_everywhere,
)
from hf_dflop.integrations.describe import choose_objective, describe_training, spec_of
from hf_dflop.integrations.resume import SampleOrder
from hf_dflop.shapes import NEEDED_COLUMNS, SHAPE_COLUMNS, Shapes

__all__ = ["install_stream", "is_stream"]

_TRIED_ROWS = 32


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is read in its own order, and has no length."""
    return isinstance(dataset, IterableDataset)


def install_stream(
    trainer: Any,
    dataloader: Any,
    *,
    num_slots: int,
    cost_model: CostModel | None,
    objective: str,
    caps: Caps,
    balance: bool,
    verify: int,
    steps_per_epoch: int,
    **settings: Any,
) -> tuple[BalancedStream, bool, SampleOrder]:
    """Put a [`BalancedStream`] into the dataloader of a Trainer.

    Returns:
        The stream, whether the collator adds dummy images, and what a checkpoint has to remember.

    Raises:
        DatasetError: the stream is not annotated, or too short.
        TrainerError: ranks would wait for ever, or dummy images and loader workers come together.
        ShapeMismatchError: the shape columns do not describe what the collator gives.
    """
    source, prepared = trainer.train_dataset, dataloader.dataset
    state = trainer.accelerator
    num_ranks = state.num_processes
    if isinstance(prepared, IterableDatasetShard):
        num_ranks, rank = prepared.num_processes, prepared.process_index
        size = prepared.batch_size // num_ranks if prepared.split_batches else prepared.batch_size
        sources: Any = source
    else:
        rank, size = state.process_index, dataloader.batch_size
        sources = [source.shard(num_shards=num_ranks, index=r) for r in range(num_ranks)] if num_ranks > 1 else source
    rows = _first_rows(source)
    shapes = Shapes.from_columns({name: [row.get(name, 0) for row in rows] for name in SHAPE_COLUMNS})
    tried = SimpleNamespace(dataset=rows, collate_fn=dataloader.collate_fn)
    spec = spec_of(trainer, cost_model)
    padded = check_samples(tried, shapes, spec.image_token_id, verify, settings["seed"])
    check_packed_samples(trainer, rows, dataloader.collate_fn, shapes)
    fills = adds_dummy_images(tried, shapes, spec.image_token_id) > 0
    needs = needs_image_everywhere(trainer)
    if needs and not balance and not fills:
        raise TrainerError(
            "in a stream without balancing, a microbatch without an image would leave the other ranks waiting for "
            "ever. Use VisionLanguageCollator(dummy_image=True), or under DDP ddp_find_unused_parameters=True."
        )
    if needs and fills and trainer.args.dataloader_num_workers > 0:
        raise TrainerError(
            f"dataloader_num_workers={trainer.args.dataloader_num_workers} plan the steps of a stream in other "
            "processes, so whether a step has only dummy images is not known here, and weight decay would act where "
            "the stock run has no gradient. Set dataloader_num_workers=0, or ddp_find_unused_parameters=True."
        )
    stream = BalancedStream(
        sources,
        cost_model or CostModel.analytic(spec, **describe_training(trainer)),
        rank=rank,
        num_ranks=num_ranks,
        num_slots=num_slots,
        batch_size=size,
        objective=choose_objective(trainer) if objective == "auto" else objective,
        padded=padded,
        caps=caps,
        balance=balance,
        spread_images=needs and balance,
        fill_images=fills,
        **settings,
    )
    if len(rows) < min(stream.samples_per_step, _TRIED_ROWS):
        raise DatasetError(
            f"the stream has {len(rows)} samples, fewer than one global batch of {stream.samples_per_step} "
            f"({num_ranks} ranks × {num_slots} microbatches × {size} samples). Use more data, a smaller "
            "per_device_train_batch_size, or fewer gradient_accumulation_steps."
        )
    stream.warm_up()
    replace_stream(dataloader, stream, _CollateOrNothing(dataloader.collate_fn))
    order = SampleOrder(
        dataset=shapes.fingerprint(),
        num_samples=-1,
        samples_per_step=stream.samples_per_step,
        steps_per_epoch=steps_per_epoch,
        window_steps=settings["window_steps"],
    )
    return stream, fills, order


class _CollateOrNothing:
    """Collates a microbatch; the empty ones before the place where a run resumes are thrown away unread."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.collate(rows) if rows else {}


def _first_rows(source: Any) -> list[dict[str, Any]]:
    reader = RowReader(source)
    rows = [reader.decoded(row) for row in islice(reader.rows(0), _TRIED_ROWS)]
    missing = next((name for row in rows for name in NEEDED_COLUMNS if name not in row), None)
    if missing is not None or not rows:
        raise DatasetError(
            f"the stream has {'no rows' if not rows else f'no shape column {missing!r}'}: it was not annotated. Train "
            "on the stream that hf_dflop.profile_dataset returns."
        )
    return rows
