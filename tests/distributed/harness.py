"""Trains the tiny model with a stock Trainer that notes, by itself, which samples every step used."""

import tempfile
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from tests.distributed import tiny


class NotingTrainer(Trainer):
    """The stock Trainer, but for a note of the sample ids of each microbatch, taken where the model is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[tuple[int, list[int]]] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.noted.append((self.state.global_step, inputs.pop("sample_ids").tolist()))
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("sample_ids")
        return super().prediction_step(model, inputs, True, *args[1:], **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # no test looks at it, and for tiny models it is a tenth of the time

    def samples_of_steps(self) -> dict[int, list[int]]:
        """For every optimizer step, the sorted ids that all ranks together used."""
        from accelerate.utils import gather_object

        steps: dict[int, list[int]] = {}
        for step, ids in gather_object(self.noted):
            steps.setdefault(step, []).extend(ids)
        return {step: sorted(ids) for step, ids in steps.items()}

    def microbatches(self) -> dict[int, int]:
        """For every optimizer step, this rank's number of microbatches."""
        counts: dict[int, int] = {}
        for step, _ in self.noted:
            counts[step] = counts.get(step, 0) + 1
        return counts


class DealingTrainer(NotingTrainer):
    """Goes through the epochs without computing: for tests of nothing but who gets which samples when."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.noted.append((self.state.global_step, inputs["sample_ids"].tolist()))
        return torch.zeros(())


def train(
    dataset: Any,
    callbacks: list[Any],
    *,
    dtype: torch.dtype = torch.float32,
    model: Any = None,
    collator: Any = None,
    resume: str | None = None,
    output_dir: str | None = None,
    evaluate_first: bool = False,
    trainer_class: type[NotingTrainer] = NotingTrainer,
    compute_loss_func: Any = None,
    **arguments: Any,
) -> NotingTrainer:
    """One training run of a fresh tiny model; `arguments` go to `TrainingArguments`."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "seed": 11,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "ddp_timeout": 60,
    }
    if model is None and resume is not None:  # Trainer would not restore the weights; DflopCallback insists on them
        model = LlavaForConditionalGeneration.from_pretrained(resume, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_class(
            model=model if model is not None else tiny.model(dtype),
            args=TrainingArguments(output_dir=output_dir or scratch, **(defaults | arguments)),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=collator if collator is not None else tiny.Collate(dtype),
            callbacks=callbacks,
            compute_loss_func=compute_loss_func,
        )
        if evaluate_first:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """The parameters, by name, of the unwrapped model; those of a sharded model whole."""
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    return {name: _whole(value.detach()).double().clone() for name, value in unwrapped.named_parameters()}


def _whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """‖found − expected‖₂ ÷ ‖expected‖₂ over all parameters together.

    Not by parameter: the key biases of the encoder have a gradient of exactly zero in exact arithmetic, so that what
    training leaves in them is rounding noise, whose relative difference means nothing.
    """
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
