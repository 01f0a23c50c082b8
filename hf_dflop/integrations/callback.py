"""The one line that a `Trainer` script adds."""

import logging
import math
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_dflop._compat import calling_trainer, replace_collator
from hf_dflop.cost import CostModel
from hf_dflop.data import PackedCollator
from hf_dflop.data.sampler import BalancedBatchSampler
from hf_dflop.data.step_plan import Caps, StepPlan
from hf_dflop.data.stream import BalancedStream
from hf_dflop.errors import DatasetError, TrainerError
from hf_dflop.integrations.checks import (
    check_exactness,
    check_gradients_are_shared,
    check_processor,
)
from hf_dflop.integrations.correction import Correct, Correction, start_correction
from hf_dflop.integrations.describe import (
    image_parameters,
)
from hf_dflop.integrations.installing import install_sampler
from hf_dflop.integrations.loss_check import check_loss_divisor
from hf_dflop.integrations.measured import MeasuredStep, gather_steps
from hf_dflop.integrations.resume import (
    SampleOrder,
    check_resumed,
    check_weights,
    recalled,
    remember,
    seal_weights,
)
from hf_dflop.integrations.steplog import step_logs
from hf_dflop.integrations.straggler import straggler_line
from hf_dflop.integrations.streaming import install_stream, is_stream
from hf_dflop.integrations.timing import StepTimer
from hf_dflop.integrations.trace import TraceWriter
from hf_dflop.shapes import Shapes

__all__ = ["DflopCallback"]

logger = logging.getLogger(__name__)


class DflopCallback(TrainerCallback):
    r"""Composes the microbatches of every optimizer step so that all ranks finish together.

    Pass it to an otherwise unchanged [`~transformers.Trainer`] (or TRL `SFTTrainer`). The samples of each optimizer
    step stay those that the stock sampler would have given it; only their grouping into ranks and microbatches
    changes, and with the loss normalised by the step's label tokens the gradient stays the same.

    It logs through `Trainer.log`, in a record of its own beside each loss record:

    | key | meaning |
    |---|---|
    | `dflop/predicted_idle_stock` | predicted share of the step that the mean rank waits under the stock grouping |
    | `dflop/predicted_idle` | the same under the balanced grouping (with `balance=False`: what it would be) |
    | `dflop/gap` | predicted step seconds ÷ lower bound − 1 of the balanced grouping |
    | `dflop/scheduling_s` | seconds to group one step, in a thread of its own, ahead of the loop |
    | `dflop/scheduling_wait_s` | seconds that the loop waited for the grouping of a step |
    | `dflop/idle_fraction` | measured: time that the mean rank waited for the slowest one ÷ step time |
    | `dflop/step_s` | measured: seconds of a step, data included |
    | `dflop/data_s` | measured: seconds between steps, for fetching and collating, mean over ranks |
    | `dflop/sync_s` | measured: gradient reduction that is not hidden, and clipping (of the slowest rank) |
    | `dflop/busy_s_rank<r>` | measured: seconds that rank r computed per step (up to 16 ranks) |
    | `dflop/idle_s_rank<r>` | measured: seconds that rank r waited for the slowest rank per step (up to 16 ranks) |
    | `dflop/busy_s_max`, `dflop/busy_s_mean` | measured: the slowest and the mean rank |
    | `dflop/slowest_rank` | measured: the rank that computed longest |
    | `dflop/cost_version` | how often the costs were corrected; the newest version, which holds a few steps later |
    | `dflop/prediction_error` | mean \|measured − predicted\| ÷ predicted of a microbatch, up to a common factor |
    | `dflop/slowdown_max` | how many times longer the slowest rank takes for the same work as the usual one |
    | `dflop/slow_rank` | a rank that was found to be slow, in two looks one after the other; absent if none is |

    A [`PackedCollator`] joins samples in training only: evaluations get the padding collator in it, since `Trainer`
    takes the rows of an evaluation for samples.

    Where a rank without an image would leave the others waiting for ever (FSDP, ZeRO, DDP that does not look for
    unused parameters), every microbatch is given a sample with one. Where steps have too few of those, use
    `VisionLanguageCollator(dummy_image=True)`.

    All values are means over the steps since the last record. Measured idle time needs ranks that meet once per step
    (DDP); under FSDP, where they meet in every layer, the measured keys but `step_s` and `data_s` are left out.

    Args:
        dataset (`datasets.Dataset` or [`Shapes`]):
            The annotated dataset that [`profile_dataset`] returned, or its shapes. It must be the dataset that the
            Trainer trains on, in the same order: Trainer drops the shape columns before a callback can see them.
        balance (`bool`, *optional*, defaults to `True`):
            `False` leaves the grouping alone and only measures and predicts: what would balancing bring?
        objective (`str`, *optional*, defaults to `"auto"`):
            What a step costs: `"step"` (ranks meet once per step: DDP with accumulation), `"slot"` (once per
            microbatch: TRL), `"stage"` (in every layer: FSDP, ZeRO-3). `"auto"` reads it from the Trainer.
        cost_model ([`CostModel`], *optional*):
            Shapes → seconds. Defaults to FLOPs from the model's config, of which only ratios matter.
        max_tokens (`int`, *optional*):
            LLM positions that one microbatch may hold, padding included. Defaults to the per-device batch size ×
            the longest sample, so that no microbatch needs more memory than an unlucky stock one.
        max_patches (`int`, *optional*):
            Encoder patches, and frames of sounds, that one microbatch may hold; the default is chosen alike.
        correct (`bool`, *optional*, defaults to `"auto"`):
            Whether measured microbatches correct the costs while training goes on. `"auto"`: where ranks meet once
            per step, so that a microbatch's own time can be measured (DDP), there are several of them, and
            `full_determinism` is off: the grouping then depends on measured times. The samples of every step, and so
            the gradient, never do.
        correct_every (`int`, *optional*, defaults to 10):
            Optimizer steps between two corrections; each costs one small gather and a wait for the device.
        slow_ranks (`str`, *optional*, defaults to `"name"`):
            What becomes of a rank that takes longer for the same work: `"name"` it, in a warning and in the log (most
            often its machine needs repair, and less work would hide that), or `"rebalance"`: give it less work, too.
            Needs `correct`.
        oversize (`str`, *optional*, defaults to `"error"`):
            A sample that is above a cap by itself is an error, or `"alone"` in a microbatch of its own.
        window_steps (`int`, *optional*, defaults to 1):
            With more than 1, giant samples that nothing in their step can balance are paired across so many
            consecutive steps. Steps then no longer hold the samples of the stock run: a sample may be used up to
            `window_steps - 1` steps earlier or later (still once an epoch), and giants share a step.
        trace_dir (`str` or `Path`, *optional*):
            Folder for one JSON line per step and rank, with every microbatch's samples and times; for
            `hf-dflop report`.
        verify (`int`, *optional*, defaults to 4):
            Random samples that are collated before training and compared with their shapes.
        seed (`int`, *optional*, defaults to 0):
            Seeds the search for a grouping.

    Raises:
        DatasetError: the dataset is not annotated (at construction).
        TrainerError: a setting under which balancing would not be exact (when training begins).
        ModelError: a [`PackedCollator`] joins samples that the model does not keep apart (when training begins).
        ShapeMismatchError: the shapes do not describe what the collator gives (when training begins).

    Example:

    ```python
    ds, profile = hf_dflop.profile_dataset(ds, processor)
    trainer = Trainer(model, args, train_dataset=ds, data_collator=collate,
                      callbacks=[hf_dflop.DflopCallback(ds)])
    trainer.train()
    ```
    """

    def __init__(
        self,
        dataset: Any,
        *,
        balance: bool = True,
        objective: Literal["auto", "step", "slot", "stage"] = "auto",
        cost_model: CostModel | None = None,
        max_tokens: int | None = None,
        max_patches: int | None = None,
        correct: bool | Literal["auto"] = "auto",
        correct_every: int = 10,
        slow_ranks: Literal["name", "rebalance"] = "name",
        oversize: Literal["error", "alone"] = "error",
        window_steps: int = 1,
        trace_dir: str | Path | None = None,
        verify: int = 4,
        seed: int = 0,
    ) -> None:
        if is_stream(dataset):
            self.shapes: Shapes | None = None
        else:
            self.shapes = dataset if isinstance(dataset, Shapes) else Shapes.of_dataset(dataset)
        self._dataset = None if isinstance(dataset, Shapes) else dataset
        self._balance = balance
        self._objective = objective
        self._cost_model = cost_model
        self._max_tokens = max_tokens
        self._max_patches = max_patches
        self._correct = Correct(correct, every=correct_every, slow_ranks=slow_ranks)
        self._oversize = oversize
        self._window_steps = window_steps
        self._trace_dir = trace_dir
        self._verify = verify
        self._seed = seed
        self.sampler: BalancedBatchSampler | BalancedStream | None = None
        self._packing: PackedCollator | None = None
        self._timer: StepTimer | None = None
        self._trace: TraceWriter | None = None
        self._trainer: Any = None
        self._pending: list[tuple[int, int, StepPlan | None]] = []
        self._unlogged: list[MeasuredStep] = []
        self._correction: Correction | None = None
        self._image_parameters: list[torch.nn.Parameter] = []

    # ---- set-up -----------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An evaluation gathers predictions row by row and takes rows for samples: only training joins samples.
        trainer = calling_trainer()
        if trainer is not None and isinstance(trainer.data_collator, PackedCollator):
            self._packing = trainer.data_collator
            trainer.data_collator = self._packing.collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = calling_trainer()
        if trainer is None:
            raise TrainerError("DflopCallback works in a transformers.Trainer; none is running this callback.")
        dataloader = kwargs["train_dataloader"]
        self._close()
        if self._packing is not None:
            replace_collator(dataloader, self._packing.collator, self._packing)
        is_sampled = has_length(dataloader) and args.train_sampling_strategy != "batch_rebalance"
        check_gradients_are_shared(trainer)
        if self._balance:
            check_exactness(trainer, dataloader, trainer.accelerator.num_processes)
            if trainer.accelerator.num_processes * args.gradient_accumulation_steps > 1:
                check_loss_divisor(trainer)
        self._trainer = trainer
        self._num_slots = args.gradient_accumulation_steps
        # Without a length (streaming, measured only) every step has all its slots.
        self._length = len(dataloader) if has_length(dataloader) else sys.maxsize
        self._steps_per_epoch = max(math.ceil(self._length / self._num_slots), 1)
        self._rank = trainer.accelerator.process_index
        self._order: SampleOrder | None = None
        self._epoch = state.global_step // self._steps_per_epoch - 1
        self._resume_step = 0 if args.ignore_data_skip else state.global_step % self._steps_per_epoch
        if is_sampled or (is_stream(dataloader.dataset) and self._balance):
            self.sampler = self._install(trainer, dataloader)
        if self.sampler is not None:
            assert self._order is not None
            if self._balance:
                check_resumed(state, self._order, skips=not args.ignore_data_skip)
                check_weights(state, trainer.accelerator.unwrap_model(trainer.model))
            if isinstance(self.sampler, BalancedStream) and (done := recalled(state)) and state.global_step:
                # Trainer skips all microbatches that it ever trained on, as if they were of one epoch.
                self._resume_step = done["step"] if not args.ignore_data_skip else 0
                skipped = 0 if args.ignore_data_skip else state.global_step * self._num_slots
                self.sampler.resume(done["epoch"], self._resume_step, skipped)
            remember(state, self._order)
        self._correction = start_correction(trainer, self.sampler, state, self._correct)
        self._timer = StepTimer(trainer.model, args.device)
        if self._trace_dir is not None:
            self._trace = TraceWriter(self._trace_dir, self._rank, resume=state.global_step > 0)

    def _install(self, trainer: Any, dataloader: Any) -> BalancedBatchSampler | BalancedStream:
        settings: dict[str, Any] = {
            "num_slots": self._num_slots,
            "cost_model": self._cost_model,
            "objective": self._objective,
            "caps": Caps(max_tokens=self._max_tokens, max_patches=self._max_patches),
            "balance": self._balance,
            "verify": self._verify,
            "steps_per_epoch": self._steps_per_epoch,
            "oversize": self._oversize,
            "window_steps": self._window_steps,
            "seed": self._seed,
        }
        sampler: BalancedBatchSampler | BalancedStream
        if is_stream(dataloader.dataset):
            sampler, fills_images, self._order = install_stream(trainer, dataloader, **settings)
        elif self.shapes is None:
            raise DatasetError("DflopCallback was given a stream, but the Trainer trains on a dataset with a length.")
        else:
            if self._dataset is not None:
                check_processor(trainer, self._dataset)
            sampler, fills_images, self._order = install_sampler(trainer, dataloader, self.shapes, **settings)
        if fills_images and not trainer.is_deepspeed_enabled:
            self._image_parameters = image_parameters(trainer)
        return sampler

    # ---- the training loop ------------------------------------------------------------------------------------

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch += 1
        self._step, self._resume_step = self._resume_step, 0
        if self.sampler is not None:
            self.sampler.set_epoch(self._epoch)
            if isinstance(self.sampler, BalancedBatchSampler):
                self.sampler.skip_to(self._step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._timer is not None
        self._timer.begin_step(min(self._num_slots, self._length - self._step * self._num_slots))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._timer is not None
        self._timer.end_slot()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._timer is not None
        self._timer.end_sync()
        if self._image_parameters and self.sampler is not None:
            plan = self.sampler.plan_of(self._epoch, self._step)
            if plan is not None and not self.sampler.has_image(plan):
                # Only dummy images were seen. Stock leaves these parameters without a gradient, and the optimizer
                # passes over them; one of zero would still decay them.
                for parameter in self._image_parameters:
                    parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._timer is not None
        self._timer.end_step()
        plan = self.sampler.plan_of(self._epoch, self._step) if self.sampler is not None else None
        self._pending.append((state.global_step, self._epoch, plan))
        self._step += 1
        if self._correction is not None and self._correction.is_due(state.global_step):
            self._collect()
            self._correction.learn()
            self._correction.remember(state)
        self._remember(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._remember(state, control)

    def _remember(self, state: TrainerState, control: TrainerControl) -> None:
        if self._order is None:
            return
        epoch = self.sampler.epoch if isinstance(self.sampler, BalancedStream) else self._epoch
        weights = (
            seal_weights(self._trainer.accelerator.unwrap_model(self._trainer.model)) if control.should_save else {}
        )
        remember(state, self._order, epoch=epoch, step=self._step, weights=weights)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # After the loss record: logging earlier in the step would take its turn, and the loss be forgotten.
        if self._timer is not None and logs is not None and "loss" in logs:
            self._report()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._timer is not None:
            self._timer.pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._timer is not None:
            self._timer.pause()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._report()
        self._close()

    # ---- what was measured ------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Gather the steps since the last call, for the log and for learning; after the same step on every rank."""
        assert self._timer is not None
        pending, self._pending = self._pending, []
        timings = self._timer.drain()
        if not pending:
            return
        accelerator = self._trainer.accelerator
        if self._trace is not None:
            for (step, epoch, plan), timing in zip(pending, timings, strict=True):
                self._trace.write_step(
                    timing, step, epoch, plan, num_ranks=accelerator.num_processes, sampler=self.sampler
                )
            self._trace.flush()
        costs = getattr(self.sampler, "costs", None)
        steps = gather_steps(accelerator, timings, pending, num_slots=self._num_slots, costs=costs)
        self._unlogged += steps
        if self._correction is not None:
            self._correction.see(steps)

    def _report(self) -> None:
        self._collect()
        steps, self._unlogged = self._unlogged, []
        if not steps:
            return
        logs = step_logs(np.stack([step.seconds for step in steps], axis=1), [step.plan for step in steps])
        if self._correction is not None:
            logs |= self._correction.logs()
        # The base class's log: TRL overrides it to add, and then forget, the metrics of the loss record.
        Trainer.log(self._trainer, logs)
        line = straggler_line(steps, getattr(self.sampler, "costs", None)) if self._rank == 0 else None
        if line is not None:
            logger.info("hf_dflop: %s", line)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        if self._trace is not None:
            self._trace.close()
            self._trace = None
        self._pending = []
        self._unlogged = []
        self._correction = None
        self._image_parameters = []
        self._trainer = None
