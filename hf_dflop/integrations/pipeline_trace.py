"""Trainer's events → the trace of a pipeline."""

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dflop.pipeline import PipelineModel, PipelineTrace, StepBatch

__all__ = ["TraceSteps"]


class TraceSteps(TrainerCallback):
    """Writes the steps of a training run into a folder; a resumed run goes on with the files that are there."""

    def __init__(self, pipe: PipelineModel, folder: str | os.PathLike[str]) -> None:
        self._pipe, self._folder = pipe, os.fspath(folder)
        self._trace: PipelineTrace | None = None
        self._batches: list[StepBatch] = []
        self._epoch = -1

    def see(self, batch: StepBatch) -> None:
        """A call of the step that is under way."""
        self._batches.append(batch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()  # of a run that was interrupted
        self._trace = PipelineTrace(self._pipe, self._folder, resume=state.global_step > 0)
        self._batches = []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch = int(state.epoch or 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches, self._batches = self._batches, []
        if self._trace is not None:
            self._trace.end_step(*batches, step=state.global_step, epoch=self._epoch)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trace is not None:
            self._trace.pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trace is not None:
            self._trace.pause()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace = None
