"""Refuses what cannot be balanced exactly, and checks that the shapes describe what training really loads.

Called once, when training begins and before the first sample is loaded. Nothing is changed here: each check either
passes or raises, with the value found, the rule, and what to change.
"""

import logging
import random
from typing import Any

import numpy as np
import torch

from hf_dflop._compat import uses_stateful_dataloader
from hf_dflop.data import PackedCollator, check_packing
from hf_dflop.errors import ShapeMismatchError, TrainerError
from hf_dflop.integrations.describe import is_image_parameter_trained, is_sharded
from hf_dflop.shapes import Shapes

__all__ = [
    "adds_dummy_images",
    "check_exactness",
    "check_gradients_are_shared",
    "check_images_and_collectives",
    "check_packed_samples",
    "check_processor",
    "check_samples",
    "needs_image_everywhere",
]

logger = logging.getLogger(__name__)


def check_exactness(trainer: Any, dataloader: Any, num_ranks: int) -> None:
    """Raise unless regrouping samples between microbatches leaves the optimizer's step what it was.

    Raises:
        TrainerError: naming the setting and its remedy.
    """
    from accelerate.data_loader import DataLoaderDispatcher

    args = trainer.args
    if isinstance(dataloader, DataLoaderDispatcher):
        raise TrainerError(
            "the dataloader dispatches batches from rank 0 (dispatch_batches=True, or left open for an "
            "IterableDataset), so no rank chooses its own samples. Set accelerator_config={'dispatch_batches': False}."
        )
    if uses_stateful_dataloader(dataloader):
        raise TrainerError(
            "a StatefulDataLoader records its sampler before training begins. Set use_stateful_dataloader=False; "
            "resuming in mid-epoch works without it."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise TrainerError(
            "train_sampling_strategy='batch_rebalance' already groups the samples, and by text length alone. Use "
            "train_sampling_strategy='random' with DflopCallback, or drop the callback."
        )
    if args.n_gpu > 1:
        raise TrainerError(
            f"one process drives {args.n_gpu} devices (DataParallel). Launch one process per device with "
            "`accelerate launch` or torchrun."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (getattr(parallelism, "sp_enabled", False) or parallelism.cp_enabled):
        raise TrainerError(
            "sequence or context parallelism splits every sample over ranks, so ranks of a group must keep the same "
            "samples. Balance with sp_size=1 and cp_size=1."
        )
    if num_ranks * args.gradient_accumulation_steps == 1:
        return  # one microbatch a step: nothing to regroup
    if num_ranks > 1 and not args.average_tokens_across_devices:
        raise TrainerError(
            "average_tokens_across_devices=False divides the loss by each rank's own number of label tokens, which "
            "depends on the grouping. Set average_tokens_across_devices=True (the default)."
        )
    if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
        raise TrainerError(
            f"{type(trainer.model).__name__} averages the means of its microbatches (accepts_loss_kwargs=False), so "
            "its gradient depends on the grouping. Set `model.accepts_loss_kwargs = True` before building the "
            "Trainer (in the run that you compare with, too), or pass a compute_loss_func that divides by "
            "num_items_in_batch."
        )


def check_gradients_are_shared(trainer: Any) -> None:
    """Raise when several ranks train, but nothing reduces their gradients.

    `trainer.evaluate()` before `trainer.train()` marks the bare model as prepared (accelerate 1.15), and training then
    runs without DDP: every rank trains a model of its own, silently.

    Raises:
        TrainerError: with the remedy.
    """
    if trainer.args.world_size == 1 or is_sharded(trainer):
        return
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        return  # tensor-parallel and meshed models are wrapped in other ways
    if not isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel):
        raise TrainerError(
            f"{trainer.args.world_size} processes train, but the model is a bare "
            f"{type(trainer.model_wrapped).__name__} and not in DDP, so their gradients are never combined. Calling "
            "trainer.evaluate() before trainer.train() does that: use TrainingArguments(eval_on_start=True) instead."
        )


def needs_image_everywhere(trainer: Any) -> bool:
    """Whether a rank that skips the vision encoder leaves the others waiting for ever, or fails."""
    wrapped = trainer.model_wrapped
    if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):  # with one rank it fails instead of waiting
        return not wrapped.find_unused_parameters and is_image_parameter_trained(trainer)
    return trainer.args.world_size > 1 and is_sharded(trainer)


def check_images_and_collectives(
    trainer: Any, shapes: Shapes, *, spreads: bool, fills: bool, samples_per_step: int, groups_per_step: int
) -> bool:
    """Raise where a microbatch without images would leave the other ranks waiting for ever, and nothing prevents it.

    With sounds likewise; of images and sounds together, a sample that has both is what a microbatch needs.

    Args:
        trainer (`Trainer`): its model is wrapped already.
        shapes ([`Shapes`]): of the whole dataset.
        spreads (`bool`): balancing may give every microbatch a sample with an image.
        fills (`bool`): the collator adds an image to a microbatch without one.
        samples_per_step (`int`), groups_per_step (`int`): samples and microbatches of all ranks in a step.

    Returns:
        `bool`: whether every microbatch needs an image.

    Raises:
        TrainerError: the dataset mixes samples with and without images, the wrapped model does not tolerate a rank
            that skips the vision encoder, the collator adds no image, and there are too few to spread.
    """
    without, needed = int((~shapes.feeds_encoders).sum()), shapes.needed_media
    wrapped = trainer.model_wrapped
    if without in (0, len(shapes)) or not needs_image_everywhere(trainer):
        return False
    if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        what = "never uses the encoder, and DDP with find_unused_parameters=False then waits for ever"
        remedy = (
            "set ddp_find_unused_parameters=True (with gradient_checkpointing_kwargs={'use_reentrant': False} if "
            "you use gradient checkpointing)"
        )
    else:
        what = "skips the collectives of the encoder that the others run, and all wait for ever"
        remedy = f"train on the samples with {needed}, or use DDP"
    per_step = samples_per_step * (1 - without / len(shapes))
    if fills or (spreads and per_step >= groups_per_step):
        return True  # the sampler looks at every step
    raise TrainerError(
        f"{without} of {len(shapes)} samples have not {needed}: a rank whose microbatch has none {what} (with or "
        f"without balancing). A step has {per_step:.1f} samples with {needed} on average for {groups_per_step} "
        f"microbatches{'' if spreads else ', and balance=False does not spread them'}. Remedy: "
        f"{'' if shapes.num_audios.any() else 'use VisionLanguageCollator(dummy_image=True), or '}{remedy}."
    )


def adds_dummy_images(dataloader: Any, shapes: Shapes, image_token_id: int | None) -> int:
    """Tokens of the row, with an image and no label, that the collator adds to a microbatch without images, or 0.

    Raises:
        TrainerError: it adds one, and there are sounds, too: their encoder may be idle where such an image is.
    """
    bare = np.flatnonzero(shapes.num_images == 0)
    if not bare.size or image_token_id is None or len(dataloader.dataset) != len(shapes):
        return 0
    with _kept_random_state():
        batch = dataloader.collate_fn([dataloader.dataset[int(bare[0])]])
    own = _without_dummy(batch, 1, image_token_id)["input_ids"]
    if own.numel() == batch["input_ids"].numel():
        return 0
    if shapes.num_audios.any():
        raise TrainerError(
            "the collator adds dummy images, and samples have sounds: a dummy would not be told from a step without "
            "images. Use VisionLanguageCollator(dummy_image=False), under DDP with ddp_find_unused_parameters=True."
        )
    if own.shape[0] == 1 and len(batch["input_ids"]) == 1:  # joined
        return int(batch["input_ids"].shape[1] - own.shape[1])
    return int(batch["attention_mask"][-1].sum()) if "attention_mask" in batch else int(own.shape[1])


def _without_dummy(batch: Any, num_rows: int, image_token_id: int | None) -> dict[str, Any]:
    """The text tensors of a batch, padded or joined, without a last sample that holds an image and no label."""
    ids = batch["input_ids"]
    kept = {key: batch[key] for key in ("input_ids", "attention_mask", "labels") if key in batch}
    if image_token_id is None or "labels" not in batch:
        return kept
    if ids.shape[0] == num_rows + 1:
        is_dummy = bool((batch["labels"][-1] == -100).all() and (ids[-1] == image_token_id).any())
        return {key: value[:-1] for key, value in kept.items()} if is_dummy else kept
    if ids.shape[0] == 1 and "position_ids" in batch:
        # A joined row: samples begin where the position in the sample, which comes first, is zero.
        position = batch["position_ids"].reshape(-1, ids.shape[1])[0]
        starts = (position == 0).nonzero().flatten().tolist()
        end = starts[-1] if len(starts) == num_rows + 1 else ids.shape[1]
        if bool((batch["labels"][0, end:] == -100).all() and (ids[0, end:] == image_token_id).any()):
            return {key: batch[key][:, :end] for key in ("input_ids", "labels")}
    return kept


def check_processor(trainer: Any, dataset: Any) -> None:
    """Raise when the dataset was annotated with another processor than the Trainer's.

    Raises:
        TrainerError: both fingerprints, and the remedy.
    """
    from hf_dflop.profile import annotation_of, processor_fingerprint

    annotation = annotation_of(dataset)
    processor = trainer.processing_class
    if annotation is None or processor is None or not hasattr(processor, "tokenizer"):
        return  # no record, or a bare tokenizer: check_samples decides
    found = processor_fingerprint(processor, labels=annotation["labels"], max_length=annotation["max_length"])
    if found != annotation["processor"]:
        raise TrainerError(
            f"the dataset was annotated with processor {annotation['processor']}, but the Trainer's "
            f"processing_class is {found}: its token counts would be wrong. Annotate again: "
            "profile_dataset(dataset, processor)."
        )


def check_samples(dataloader: Any, shapes: Shapes, image_token_id: int | None, count: int, seed: int) -> bool:
    """Collate `count` random samples as training will, and compare their lengths with the shapes.

    Returns:
        `bool`: whether the collator pads (`True`), or joins samples into one row.

    Raises:
        ShapeMismatchError: naming the sample, the column, and both numbers.
        TrainerError: the collated batch has no labels, so no label tokens can be counted.
    """
    dataset, collate = dataloader.dataset, dataloader.collate_fn
    if len(dataset) != len(shapes):
        raise ShapeMismatchError(
            f"the annotated dataset has {len(shapes)} samples, the Trainer's train_dataset has {len(dataset)}. "
            "Give both the same dataset: Trainer(train_dataset=ds, callbacks=[DflopCallback(ds)])."
        )
    generator = np.random.default_rng(seed)
    picked = generator.choice(len(shapes), size=min(max(count, 2), len(shapes)), replace=False).tolist()
    with _kept_random_state():
        batch: Any = None
        for index in picked[:count]:
            batch = _without_dummy(collate([dataset[index]]), 1, image_token_id)
            _compare(batch, shapes, index, image_token_id)
        # Two samples of different length tell a padding collator from one that joins them.
        pair = collate([dataset[index] for index in picked[:2]]) if len(picked) > 1 else batch
    if "labels" not in pair:
        raise TrainerError(
            f"the collator gives {sorted(pair)} and no 'labels', so the label tokens of a step cannot be counted "
            "and its loss would depend on the grouping. Return labels from the data collator."
        )
    rows = _without_dummy(pair, len(picked[:2]), image_token_id)["input_ids"]
    return bool(rows.shape[0] == min(2, len(picked)))


def check_packed_samples(trainer: Any, dataset: Any, collate: Any, shapes: Shapes) -> None:
    """Run [`check_packing`] on the shortest samples when `collate` is a [`PackedCollator`], or holds one.

    Every rank runs the same forward passes, so that a sharded model may take part.

    Raises:
        ModelError: the model does not keep joined samples apart.
    """
    collator = collate
    while not isinstance(collator, PackedCollator):
        # One that counts or logs, or Trainer's that drops columns, around the one that packs.
        collator = getattr(collator, "collator", getattr(collator, "data_collator", None))
        if collator is None:
            return
    if len(shapes) < 2:
        return
    order = np.argsort(shapes.llm_tokens, kind="stable")
    has_image = shapes.feeds_encoders[order]
    picked = [*order[has_image][:2], *order[~has_image][:1]]
    if len(picked) < 2:
        picked = list(order[:2])
    model = trainer.model_wrapped if is_sharded(trainer) else trainer.accelerator.unwrap_model(trainer.model)
    with _kept_random_state():
        found = check_packing(model, collator, [dataset[int(index)] for index in picked])
    logger.info(
        "hf_dflop: packed logits equal unpacked ones to %.1e of the largest (rounding explains %.0e); no sample of %d "
        "moved another",
        found.error,
        found.tolerance,
        found.num_samples,
    )


def _compare(batch: Any, shapes: Shapes, index: int, image_token_id: int | None) -> None:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    # A packed row has no padding, and its mask, if any, says who attends to whom.
    is_padding_mask = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
    length = int(mask.sum()) if is_padding_mask else int(ids.numel())
    expected = int(shapes.llm_tokens[index])
    if length != expected:
        raise ShapeMismatchError(
            f"sample {index} has {length} LLM tokens when collated, but its columns dflop_image_tokens + "
            f"dflop_audio_tokens + dflop_text_tokens say {expected}. The dataset was annotated with another "
            "processor, chat template or max_length, or is in another order: annotate it again with the processor "
            "that the collator uses."
        )
    if image_token_id is not None:
        images, expected = int((ids == image_token_id).sum()), int(shapes.image_tokens[index])
        if images != expected:
            raise ShapeMismatchError(
                f"sample {index} has {images} image tokens when collated, but its column dflop_image_tokens says "
                f"{expected}. Annotate the dataset again with the processor that the collator uses."
            )


class _kept_random_state:
    """Gives every random generator its state back: a check must not change what training draws."""

    def __enter__(self) -> None:
        self._python, self._numpy, self._torch = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )

    def __exit__(self, *_: object) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
