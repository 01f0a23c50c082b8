"""Refuses what Trainer or Accelerator cannot do exactly with a pipeline, by name and with the remedy, before
anything is built.

In: their own arguments. Out: nothing, or a `TrainerError`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from hf_dflop.errors import TrainerError
from hf_dflop.integrations.callback import DflopCallback
from hf_dflop.pipeline import PipelineModel

__all__ = ["AUTOCAST", "check_accelerator", "check_arguments", "check_dataset", "check_pieces", "check_precision"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What `mixed_precision` computes in."""

_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("label_smoothing_factor", "set it to 0: the loss is the model's own"),
    ("torch_compile", "compile the model's layers yourself before PipelineModel, or leave it out"),
    ("deepspeed", "the plan lays out the model: leave it out"),
    ("fsdp", "the plan lays out the model: leave it out"),
    ("parallelism_config", "the plan lays out the model: leave it out"),
    ("gradient_checkpointing", "set `checkpointing` of the plan's modules instead"),
    ("neftune_noise_alpha", "leave it out: the noise would differ between ranks"),
    ("use_liger_kernel", "apply the kernels to the model before PipelineModel"),
    ("auto_find_batch_size", "leave it out: `hf-dflop plan` finds what fits"),
    ("optim_target_modules", "use another optimizer: layer-wise ones step in the backward"),
    ("batch_eval_metrics", "leave it out: compute_metrics gets the whole dataset"),
    ("include_for_metrics", "leave it out: compute_metrics gets predictions and labels"),
)


def check_arguments(args: Any, pipe: PipelineModel) -> None:
    """Raises `TrainerError` for a setting of `TrainingArguments` that the pipeline does not run."""
    for name, remedy in _UNSUPPORTED:
        value = getattr(args, name, None)
        if value not in (None, False, 0, 0.0, "", [], {}):
            raise TrainerError(f"{name}={value!r} does not go with a pipeline; {remedy}.")
    if getattr(args, "activation_checkpointing", False):
        raise TrainerError("activation_checkpointing does not go with a pipeline; set `checkpointing` in the plan.")
    check_precision("bf16" if args.bf16 else "fp16" if args.fp16 else "no", pipe)
    if args.include_num_input_tokens_seen not in (False, "no"):
        raise TrainerError("include_num_input_tokens_seen needs the ids of all ranks; set it to 'no'.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise TrainerError("train_sampling_strategy='batch_rebalance' composes microbatches itself; use 'random'.")
    if not args.accelerator_config.use_seedable_sampler:
        raise TrainerError("use_seedable_sampler=False draws another order on every rank; set it to True.")
    if not args.eval_do_concat_batches:
        raise TrainerError("eval_do_concat_batches=False keeps batches that a pipeline does not form; set it to True.")
    calls, rest = divmod(args.gradient_accumulation_steps, pipe.plan.num_microbatches)
    if rest or not calls:
        raise TrainerError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, and the plan has "
            f"{pipe.plan.num_microbatches} microbatches: a pipeline accumulates over them. Set it to "
            f"{pipe.plan.num_microbatches} or a multiple, and per_device_train_batch_size to the samples of one."
        )
    wanted = pipe.plan.global_batch_size
    found = args.train_batch_size * args.gradient_accumulation_steps * pipe.plan.llm.dp
    if wanted not in (None, found):
        raise TrainerError(
            f"the plan's global_batch_size is {wanted}; per_device_train_batch_size={args.train_batch_size} × "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} × {pipe.plan.llm.dp} replicas make "
            f"{found}."
        )


def check_precision(name: str, pipe: PipelineModel) -> None:
    """Raises `TrainerError` if the pipeline does not compute in the `mixed_precision` that was asked for."""
    wanted = AUTOCAST.get(name)
    if wanted is not None and pipe.wire.autocast != wanted:
        raise TrainerError(
            f"{name} is asked for, but the pipeline computes under autocast to {pipe.wire.autocast}; build it with "
            f"PipelineModel.from_pretrained(..., autocast={wanted})."
        )
    if name == "fp16" and pipe.wire.dtype == torch.float16:
        raise TrainerError(
            "fp16 scales gradients of float32 parameters, and the model's are float16; load it with "
            "dtype=torch.float32."
        )


def check_accelerator(accelerator: Any) -> None:
    """Raises `TrainerError` for an `Accelerator` under which a pipeline does not run."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or getattr(accelerator, "parallelism_config", None):
        raise TrainerError(f"the Accelerator is set to {kind}, but the plan lays out the model: leave it out.")
    if not dist.is_initialized():
        raise TrainerError(
            "there is one process without a process group; launch as many as the plan has ranks, with accelerate "
            "launch or torchrun."
        )
    if accelerator.mixed_precision not in ("no", *AUTOCAST):
        raise TrainerError(
            f"mixed_precision={accelerator.mixed_precision!r} does not go with a pipeline; use bf16, fp16 or no."
        )
    if not accelerator.gradient_state.sync_with_dataloader:
        raise TrainerError("sync_with_dataloader=False joins steps over the end of an epoch; set it to True.")


def check_pieces(model: Any, collator: Any, callbacks: Any, **given: Any) -> None:
    """Raises `TrainerError` for arguments of `Trainer` itself.

    Args:
        model: must be a [`PipelineModel`].
        collator: the data collator.
        callbacks: those given to `Trainer`.
        given: arguments that must not be given.
    """
    if not isinstance(model, PipelineModel):
        raise TrainerError(
            f"DflopTrainer trains a PipelineModel, not a {type(model).__name__}: build one with "
            "PipelineModel.from_model(model, plan=plan), or use Trainer with DflopCallback."
        )
    for name, value in given.items():
        if value is not None:
            raise TrainerError(f"{name} is not supported by DflopTrainer; {_REMEDIES[name]}.")
    if collator is None:
        raise TrainerError("DflopTrainer needs a data_collator: a VisionLanguageCollator or a PackedCollator.")
    if getattr(getattr(collator, "collator", collator), "dummy_image", False):
        raise TrainerError(
            "dummy_image=True adds rows that no shape column counts; a pipeline needs none: leave it out."
        )
    if any(isinstance(callback, DflopCallback) or callback is DflopCallback for callback in callbacks or ()):
        raise TrainerError(
            "DflopCallback balances data-parallel runs; DflopTrainer balances by its plan: leave it out."
        )


_REMEDIES = {
    "model_init": "build the PipelineModel first",
    "compute_loss_func": "the loss is the model's own, divided by the step's label tokens",
    "peft_config": "add adapters to the model before PipelineModel",
}


def check_dataset(dataset: Any, what: str) -> None:
    """Raises `TrainerError` unless rows can be read by index."""
    if dataset is None:
        raise TrainerError(f"there is no {what}.")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TrainerError(f"the {what} is a stream; each rank reads rows by index: use a map-style dataset.")
