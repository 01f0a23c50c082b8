"""Puts a balanced batch sampler under a Trainer that trains on a dataset with a length.

In: the prepared dataloader, and the shapes of its dataset. Out: the same dataloader, loading the microbatches of a
`BalancedBatchSampler`.

Assumptions: the shapes are those of the dataset that the dataloader reads, in its order (a few samples are collated
and compared).
"""

import logging
from typing import Any

from hf_dflop._compat import replace_batch_sampler
from hf_dflop.cost import CostModel
from hf_dflop.data.sampler import BalancedBatchSampler
from hf_dflop.data.step_plan import Caps, stock_caps
from hf_dflop.errors import DatasetError
from hf_dflop.integrations.checks import (
    adds_dummy_images,
    check_images_and_collectives,
    check_packed_samples,
    check_samples,
)
from hf_dflop.integrations.describe import (
    choose_objective,
    computes_all_pairs,
    describe_training,
    dummy_of,
    spec_of,
)
from hf_dflop.integrations.resume import SampleOrder
from hf_dflop.integrations.stock import StockSharding
from hf_dflop.shapes import Shapes

__all__ = ["install_sampler"]

logger = logging.getLogger(__name__)


def install_sampler(
    trainer: Any,
    dataloader: Any,
    shapes: Shapes,
    *,
    num_slots: int,
    cost_model: CostModel | None,
    objective: str,
    caps: Caps,
    balance: bool,
    verify: int,
    steps_per_epoch: int,
    window_steps: int,
    **settings: Any,
) -> tuple[BalancedBatchSampler, bool, SampleOrder]:
    """Put a [`BalancedBatchSampler`] into the dataloader of a Trainer.

    Returns:
        The sampler, whether the collator adds dummy images, and what a checkpoint has to remember.

    Raises:
        DatasetError: fewer samples than one global batch.
        TrainerError: ranks would wait for ever.
        ModelError: the collator joins samples that the model does not keep apart.
        ShapeMismatchError: the shapes do not describe what the collator gives.
    """
    sharding = StockSharding(dataloader.batch_sampler)
    global_batch = sharding.num_ranks * num_slots * sharding.microbatch_size
    if len(shapes) < global_batch:
        raise DatasetError(
            f"the dataset has {len(shapes)} samples, fewer than one global batch of {global_batch} "
            f"({sharding.num_ranks} ranks × {num_slots} microbatches × {sharding.microbatch_size} samples). "
            "Use more data, a smaller per_device_train_batch_size, or fewer gradient_accumulation_steps."
        )
    spec = spec_of(trainer, cost_model)
    padded = check_samples(dataloader, shapes, spec.image_token_id, verify, settings["seed"])
    check_packed_samples(trainer, dataloader.dataset, dataloader.collate_fn, shapes)
    dummy_tokens = adds_dummy_images(dataloader, shapes, spec.image_token_id)
    fills_images = dummy_tokens > 0
    needs_images = check_images_and_collectives(
        trainer,
        shapes,
        spreads=balance,
        fills=fills_images,
        samples_per_step=global_batch,
        groups_per_step=sharding.num_ranks * num_slots,
    )
    order = SampleOrder(
        dataset=shapes.fingerprint(),
        num_samples=len(shapes),
        samples_per_step=global_batch,
        steps_per_epoch=steps_per_epoch,
        window_steps=window_steps,
    )
    stock = stock_caps(shapes, sharding.microbatch_size)
    cost_model = cost_model or CostModel.analytic(spec, **describe_training(trainer))
    sampler = BalancedBatchSampler(
        sharding.epoch_groups,
        shapes,
        cost_model,
        rank=sharding.rank,
        num_ranks=sharding.num_ranks,
        num_slots=num_slots,
        length=sharding.length,
        objective=choose_objective(trainer) if objective == "auto" else objective,
        padded=padded,
        caps=Caps(
            max_tokens=caps.max_tokens or stock.max_tokens,
            max_patches=caps.max_patches or stock.max_patches,
        ),
        balance=balance,
        set_stock_epoch=sharding.set_epoch,
        spread_images=needs_images and balance,
        fill_images=fills_images,
        window_steps=window_steps,
        samples_per_step=global_batch,
        all_pairs=computes_all_pairs(trainer),
        dummy=dummy_of(cost_model, shapes, dummy_tokens),
        **settings,
    )
    sampler.warm_up()
    replace_batch_sampler(dataloader, sampler)
    logger.info(
        "hf_dflop %s %d samples over %d ranks × %d microbatches per step (%s, objective %r)",
        "balances" if balance else "measures",
        len(shapes),
        sharding.num_ranks,
        num_slots,
        "padded" if padded else "packed",
        sampler.objective,
    )
    return sampler, fills_images, order
