"""A hand-written Accelerate loop over a pipeline.

In: an `Accelerator`, a stock model, an optimizer, annotated rows, a plan. Out: model, optimizer and dataloader that
the usual loop runs: `accumulate`, `backward`, `clip_grad_norm_`, `save_state` and a prepared scheduler mean what they
mean for a data-parallel model.

Assumptions: every rank runs the same script. What a rank loads, and in which groups, is that of `DflopTrainer`.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.data import DataLoader, default_collate

from hf_dflop.cost import CostModel
from hf_dflop.errors import TrainerError
from hf_dflop.integrations.pipeline_accelerator import put_right
from hf_dflop.integrations.pipeline_checks import AUTOCAST, check_accelerator, check_dataset, check_precision
from hf_dflop.integrations.pipeline_data import CallSampler, join_slots, make_slots
from hf_dflop.integrations.pipeline_optimizer import check_by_number, keep_share, names_of
from hf_dflop.integrations.pipeline_scaler import scale_together
from hf_dflop.pipeline import PipelineModel
from hf_dflop.pipeline.skeleton import unwrap
from hf_dflop.plan import Plan

__all__ = ["prepare"]


def prepare(
    accelerator: Any,
    model: Any,
    optimizer: Any,
    dataset: Any,
    plan: Plan,
    *,
    cost_model: CostModel | None = None,
    seed: int = 0,
    check: bool = True,
    **loader: Any,
) -> tuple[PipelineModel, AcceleratedOptimizer, DataLoaderShard]:
    """Make model, optimizer and data of an Accelerate loop those of this rank of a plan; use it in place of
    `accelerator.prepare`.

    An item of the dataloader holds `plan.num_microbatches` microbatches, and one call of the model runs them all,
    forward and backward. `Accelerator(gradient_accumulation_steps=k)` accumulates over k such calls. The loss is the
    sum of token losses ÷ label tokens of the optimizer step (times k, by which `accelerator.backward` divides), so a
    step is exactly that of one process with the whole batch.

    Args:
        accelerator (`Accelerator`): launched with as many processes as the plan has ranks.
        model (`PreTrainedModel`, `PeftModel` or [`PipelineModel`]):
            The stock model, the same on every rank; not wrapped but by peft.
        optimizer (`torch.optim.Optimizer` or `Callable`):
            Built on `model`; its groups, options and state are kept for this rank's parameters, and schedulers on it
            stay attached. Or a class or function that makes one from parameters.
        dataset (`datasets.Dataset` or `DataLoader`):
            Rows annotated by [`profile_dataset`], or a dataloader of them as one data-parallel process would have it.
        plan ([`Plan`]): layers, replicas and microbatches.
        cost_model ([`CostModel`], *optional*): shapes → seconds, to regroup samples by; by default FLOPs.
        seed (`int`, defaults to 0): seeds the search for microbatches.
        check (`bool`, defaults to `True`): at the first call, try the stages on a small copy of the model.
        loader:
            With rows, the arguments of their `DataLoader`: `batch_size` (samples of a microbatch), `collate_fn` (a
            [`VisionLanguageCollator`] or [`PackedCollator`], or a function that pads on the right), `shuffle`,
            `num_workers`, ...

    Returns:
        `(PipelineModel, AcceleratedOptimizer, DataLoader)`: `model(batch).loss` of an item of the dataloader.
        `model.save_pretrained(folder)`, called on every rank, writes a stock checkpoint.

    Raises:
        TrainerError: an accelerator, optimizer or dataloader that a pipeline does not run, with the remedy.
        PlanError: the plan does not fit the model or the number of processes.

    Example:

    ```python
    accelerator = Accelerator(gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    model, optimizer, dataloader = hf_dflop.prepare(
        accelerator, model, optimizer, annotated, plan, batch_size=2, shuffle=True, collate_fn=collator
    )
    scheduler = accelerator.prepare(scheduler)
    for epoch in range(2):
        for batch in dataloader:
            with accelerator.accumulate(model):
                loss = model(batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    model.save_pretrained(folder)
    ```
    """
    check_accelerator(accelerator)
    stock = _stock_loader(dataset, loader)
    calls = accelerator.gradient_accumulation_steps
    _check_batch_size(stock, plan, calls)
    names = names_of(unwrap(model))
    if isinstance(model, PipelineModel):
        pipe = model
        if pipe.plan != plan:
            raise TrainerError("the PipelineModel was built for another plan; give the same one to prepare.")
    else:
        autocast = AUTOCAST.get(accelerator.mixed_precision)
        pipe = PipelineModel.from_model(model, plan=plan, device=accelerator.device, autocast=autocast, check=check)
    check_precision(accelerator.mixed_precision, pipe)
    scale_together(accelerator, pipe)
    pipe._is_accelerate_prepared = True  # accelerate then leaves it as it is: no DDP around it
    pipe.loss_factor = float(calls)
    kept = keep_share(optimizer, names, pipe)
    check_by_number(kept, pipe)
    ours = AcceleratedOptimizer(kept, device_placement=False, scaler=accelerator.scaler)
    rows, slots = make_slots(
        stock,
        pipe,
        accelerator,
        stock.collate_fn,
        slots=plan.num_microbatches * calls,
        training=True,
        cost_model=cost_model,
        seed=seed,
        data_seed=_same_seed(accelerator),
    )
    dataloader = DataLoaderShard(
        rows,
        batch_sampler=CallSampler(slots, plan.num_microbatches),
        collate_fn=join_slots,
        num_workers=stock.num_workers,
        persistent_workers=stock.persistent_workers,
        prefetch_factor=stock.prefetch_factor,
        worker_init_fn=stock.worker_init_fn,
        multiprocessing_context=stock.multiprocessing_context,
    )
    put_right(accelerator, pipe, ours)
    return pipe, ours, dataloader


def _stock_loader(dataset: Any, settings: dict[str, Any]) -> DataLoader:
    if isinstance(dataset, DataLoader):
        if settings:
            raise TrainerError(
                f"{', '.join(settings)} was given beside a DataLoader, which has its own; leave it out."
            )
        stock: DataLoader = dataset
    else:
        check_dataset(dataset, "dataset")
        stock = DataLoader(dataset, **settings)
    check_dataset(stock.dataset, "dataset")
    if stock.collate_fn is default_collate:
        raise TrainerError("collate_fn is missing: give a VisionLanguageCollator or a PackedCollator.")
    if getattr(getattr(stock.collate_fn, "collator", stock.collate_fn), "dummy_image", False):
        raise TrainerError(
            "dummy_image=True adds rows that no shape column counts; a pipeline needs none: leave it out."
        )
    if isinstance(stock, DataLoaderShard):
        raise TrainerError("the dataloader is prepared already; give prepare the plain one.")
    return stock


def _check_batch_size(stock: DataLoader, plan: Plan, calls: int) -> None:
    size = stock.batch_size
    found = (size or 0) * plan.num_microbatches * calls * plan.llm.dp
    if plan.global_batch_size not in (None, found) and size is not None:
        raise TrainerError(
            f"the plan's global_batch_size is {plan.global_batch_size}; batch_size={size} × "
            f"{plan.num_microbatches} microbatches × {calls} accumulated calls × {plan.llm.dp} replicas make {found}."
        )


def _same_seed(accelerator: Any) -> int:
    """Of the order of the data: accelerate's `data_seed`, else rank 0's torch seed, the same on every rank."""
    told = [accelerator.dataloader_config.data_seed]
    if told[0] is None:
        told = [torch.random.initial_seed()]
    dist.broadcast_object_list(told, device=accelerator.device)
    return int(told[0])
