"""Hugging Face `Trainer` over a pipeline.

In: a `PipelineModel`, `TrainingArguments`, annotated rows, a collator. Out: Trainer's own loop, logs, callbacks and
checkpoints; what the optimizer sees is what a stock Trainer with as many data-parallel processes as the LLM has
replicas would see.

Trainer's loop runs unchanged. It is given a dataloader of microbatch slots, exactly as long as the stock one; the
"training step" of a slot keeps it, and that of the last slot of a call runs the pipeline's schedule over all of them.

Assumptions: every rank runs the same script; the output folder is shared by all ranks.
"""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    SaveStrategy,
    denumpify_detensorize,
    rotate_checkpoints,
)

from hf_dflop.cost import CostModel
from hf_dflop.data import PackedCollator
from hf_dflop.errors import TrainerError
from hf_dflop.integrations.pipeline_checkpoint import (
    STAGING_PREFIX,
    clear_staging,
    load_weights,
    publish,
)
from hf_dflop.integrations.pipeline_checks import check_arguments, check_dataset, check_pieces
from hf_dflop.integrations.pipeline_data import join_slots, make_slots, slot_loader
from hf_dflop.integrations.pipeline_optimizer import check_by_number
from hf_dflop.integrations.pipeline_predict import Predictions
from hf_dflop.integrations.pipeline_scaler import scale_together
from hf_dflop.integrations.pipeline_state import load_optimizer, save_optimizer
from hf_dflop.integrations.pipeline_trace import TraceSteps
from hf_dflop.pipeline import PipelineModel, StepBatch

__all__ = ["DflopTrainer", "PipelineTrainerMixin"]

logger = logging.getLogger(__name__)


class PipelineTrainerMixin:
    """What makes a `Trainer` run a pipeline; put it before the Trainer class: `class Mine(PipelineTrainerMixin, T)`.

    See [`DflopTrainer`] for what it does.
    """

    args: Any
    model: Any
    accelerator: Any
    state: Any
    control: Any
    callback_handler: Any
    optimizer: Any
    lr_scheduler: Any
    compute_metrics: Any
    preprocess_logits_for_metrics: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *positional: Any,
        cost_model: CostModel | None = None,
        seed: int = 0,
        trace_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        refused = (
            "model_init",
            "compute_loss_func",
            "peft_config",
        )
        given = {name: kwargs.get(name) for name in refused if name in kwargs}
        if positional:
            raise TrainerError("give DflopTrainer its arguments after data_collator by name.")
        check_pieces(model, data_collator, kwargs.get("callbacks"), **given)
        if args is None:
            raise TrainerError("DflopTrainer needs args: TrainingArguments(output_dir=...).")
        check_arguments(args, model)
        self.pipe: PipelineModel = model
        self._cost_model = cost_model
        self._balance_seed = seed
        self._slots: list[StepBatch] = []
        self._slots_left = 0
        model._is_accelerate_prepared = True  # accelerate then leaves it as it is: no DDP, no autocast around it
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)  # type: ignore[call-arg]
        scale_together(self.accelerator, model)
        self.model_accepts_loss_kwargs = True
        self._tracing = None if trace_dir is None else TraceSteps(model, trace_dir)
        if self._tracing is not None:
            self.callback_handler.add_callback(self._tracing)

    # Placement: the pipeline has put itself where it runs ------------------------------------------------------

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self.pipe.wire.device.type != torch.device(device).type:
            raise TrainerError(
                f"the pipeline is on {self.pipe.wire.device}, TrainingArguments say {device}: build it with "
                "PipelineModel(..., device=args.device)."
            )

    # Data ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One item per microbatch of the stock dataloader of one replica."""
        dataset = getattr(self, "train_dataset", None)
        check_dataset(dataset, "train_dataset")
        slots = self.args.gradient_accumulation_steps
        return self._slot_loader(dataset, self._get_train_sampler(dataset), slots, training=True)  # type: ignore[attr-defined]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every sample once, in order, in microbatches of `per_device_eval_batch_size`."""
        own = getattr(self, "eval_dataset", None)
        if isinstance(eval_dataset, str):
            eval_dataset = own[eval_dataset] if own is not None else None
        dataset = own if eval_dataset is None else eval_dataset
        check_dataset(dataset, "eval_dataset")
        return self._slot_loader(dataset, None, self.pipe.plan.num_microbatches, training=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As that of an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def _slot_loader(self, dataset: Any, sampler: Any, slots: int, *, training: bool) -> DataLoader:
        args = self.args
        collator: Any = self.data_collator  # type: ignore[attr-defined]
        size = args.train_batch_size if training else args.eval_batch_size
        drop_last = args.dataloader_drop_last and training
        stock: DataLoader = DataLoader(dataset, batch_size=size, sampler=sampler, drop_last=drop_last)
        rows, slot_sampler = make_slots(
            stock,
            self.pipe,
            self.accelerator,
            collator,
            slots=slots,
            training=training,
            cost_model=self._cost_model,
            seed=self._balance_seed,
        )
        return slot_loader(rows, slot_sampler, args, training=training)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of an optimizer step."""
        return int(args.train_batch_size * args.gradient_accumulation_steps * self.pipe.plan.llm.dp)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[StepBatch], None]:
        """The slots of one optimizer step."""
        slots = []
        for _ in range(num_batches):
            slot = next(epoch_iterator, None)
            if slot is None:
                break
            slots.append(slot)
        self._slots, self._slots_left = [], len(slots)
        return slots, None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer of `TrainingArguments`; refused where it would not be exact, see `check_by_number`."""
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        check_by_number(made, self.pipe)
        return made

    # A step ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: StepBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Keep a slot; at the last one of a call, run them all. Returns the call's share of the step's loss, or 0."""
        self._slots.append(inputs)
        self._slots_left -= 1
        if len(self._slots) < self.pipe.plan.num_microbatches and self._slots_left:
            return torch.zeros((), device=self.args.device)
        batch, self._slots = join_slots(self._slots), []
        if self._tracing is not None:
            self._tracing.see(batch)
        self.pipe.train()
        result = self.pipe.step(batch, sync=not self._slots_left)
        return torch.tensor(result.loss, device=self.args.device)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Not used.

        Raises:
            TrainerError: always.
        """
        raise TrainerError(
            "compute_loss does not see the whole model in a pipeline: the loss is the model's own, divided by the "
            "label tokens of the step."
        )

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        return

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        return self.pipe.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            grad_norm = self.pipe.grad_norm()
        return grad_norm

    # Evaluation -----------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss of every microbatch, weighted by its samples, as Trainer does; predictions where they are asked
        for, by `predict` or `compute_metrics`."""
        was_training = self.pipe.training
        self.pipe.eval()
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if not loss_only and isinstance(self.data_collator, PackedCollator):  # type: ignore[attr-defined]
            raise TrainerError(
                "packed microbatches have no row for each sample, which predict and compute_metrics need; give a "
                "VisionLanguageCollator."
            )
        kept = None if loss_only else Predictions(self.pipe, self.preprocess_logits_for_metrics)
        total = torch.zeros(2, dtype=torch.float64, device=self.pipe.wire.device)
        slots: list[StepBatch] = []
        sampler: Any = dataloader.batch_sampler
        sampler.set_epoch(0)
        for at, slot in enumerate(dataloader, start=1):
            slots.append(slot)
            if len(slots) == self.pipe.plan.num_microbatches or at == len(dataloader):
                self._evaluate_call(slots, total, kept)
                slots = []
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.pipe.train(was_training)
        dist.all_reduce(total)
        loss_sum, samples = total.tolist()
        predictions, labels = (None, None) if kept is None else kept.join()
        metrics = {}
        if self.compute_metrics is not None and predictions is not None:
            metrics = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        metrics = denumpify_detensorize(metrics)
        metrics["loss"] = loss_sum / max(samples, 1)
        named = {
            key if key.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{key}": value
            for key, value in metrics.items()
        }
        return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=named, num_samples=int(samples))

    def _evaluate_call(self, slots: list[StepBatch], total: torch.Tensor, kept: Predictions | None) -> None:
        batch = join_slots(slots, label_tokens=1)
        result = self.pipe.step(batch, backward=False, mean=True, keep_logits=kept is not None)
        if kept is not None:
            kept.add(batch, result)
        for microbatch, loss in result.losses.items():
            samples = len(batch.shape.microbatches[microbatch][self.pipe.place.replica].features)
            total += torch.stack([loss.double() * samples, torch.full_like(loss.double(), samples)])

    # Checkpoints --------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see [`~transformers.Trainer.train`]."""
        clear_staging(self.args.output_dir)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a stock checkpoint; all ranks call it, rank 0 writes."""
        folder = self.args.output_dir if output_dir is None else output_dir
        self.pipe.save_pretrained(folder)
        if self.pipe.place.rank == 0:
            processor = getattr(self, "processing_class", None)
            if processor is not None:
                processor.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
        dist.barrier()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = self.args.output_dir
        step, best = self.state.global_step, self.state.best_global_step
        final = os.path.join(run_dir, f"checkpoint-{step}")
        staging = os.path.join(run_dir, f"{STAGING_PREFIX}{step}")
        self.store_flos()  # type: ignore[attr-defined]
        if self.pipe.place.rank == 0:
            os.makedirs(staging, exist_ok=True)
        self.save_model(staging, _internal_call=True)
        if best and self.args.save_strategy != SaveStrategy.NO:
            best_dir = os.path.join(run_dir, f"checkpoint-{best}")
            if best == step or os.path.exists(best_dir):
                self.state.best_model_checkpoint = best_dir
        if not self.args.save_only_model:
            save_optimizer(self.pipe, self.optimizer, staging)
            self._save_rng_state(staging)  # type: ignore[attr-defined]
            self._save_scaler(staging)  # type: ignore[attr-defined]
        if self.pipe.place.rank == 0:
            if not self.args.save_only_model:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(staging, "scheduler.pt"))
            self._export_callbacks()
            self.state.save_to_json(os.path.join(staging, "trainer_state.json"))
            self.pipe.plan.save(os.path.join(staging, "plan.json"))
        publish(staging, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)  # type: ignore[attr-defined]
        if self.pipe.place.rank == 0:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _export_callbacks(self) -> None:
        for exported in [*self.callback_handler.callbacks, self.control]:
            if isinstance(exported, ExportableState):
                name, found = type(exported).__name__, exported.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(found)
                else:
                    self.state.stateful_callbacks[name] = found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.pipe, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(self.pipe, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(self.pipe, self.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))


class DflopTrainer(PipelineTrainerMixin, Trainer):
    """A [`~transformers.Trainer`] that trains a [`PipelineModel`].

    Each optimizer step takes the samples that a stock Trainer on `plan.llm.dp` processes would, with the same
    `TrainingArguments`: `per_device_train_batch_size` samples in each of `gradient_accumulation_steps` microbatches of
    each LLM replica. Within the step they are regrouped by cost, unless `plan.balance` is off. Every rank loads by
    index what it works on alone; with a [`VisionLanguageCollator`], LLM ranks decode no image.

    Logging, callbacks, schedules, clipping, epochs, `save_model` (a stock checkpoint), checkpoints, resuming (under
    another plan, too) and `load_best_model_at_end` work as ever. A checkpoint is written beside its place and renamed
    when it is complete. Evaluation gives the loss. With `compute_metrics`, and in `predict`, logits go to all ranks,
    as `preprocess_logits_for_metrics` makes them.

    Args:
        model ([`PipelineModel`]): the pipeline; built after the process group is there.
        args (`TrainingArguments`): `gradient_accumulation_steps` is `plan.num_microbatches`, or a multiple of it.
        data_collator: a [`VisionLanguageCollator`] or [`PackedCollator`], or a function that pads on the right.
        train_dataset, eval_dataset (`datasets.Dataset`): annotated by [`profile_dataset`].
        cost_model ([`CostModel`], *optional*): shapes → seconds; by default FLOPs.
        seed (`int`, defaults to 0): seeds the search for microbatches.
        trace_dir (`str` or `Path`, *optional*):
            Folder for `trace-rank*.jsonl`: when each rank ran each action of each step and what it waited for, which
            `hf-dflop simulate --against` compares with its simulation.
        kwargs: other arguments of `Trainer`.

    Raises:
        TrainerError: a setting that a pipeline does not run, with the remedy.

    Example:

    ```python
    args = TrainingArguments("out", per_device_train_batch_size=4, gradient_accumulation_steps=8)
    pipe = hf_dflop.PipelineModel.from_pretrained(model_id, plan=plan, device=args.device)
    hf_dflop.DflopTrainer(pipe, args, collate, train_dataset=annotated).train()
    ```
    """
