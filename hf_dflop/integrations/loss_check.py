"""Does a model divide its loss by the number of label tokens that Trainer gives it?

Trainer takes every model whose `forward` has `**kwargs` for one that does. Some drop the number and return the mean of
the microbatch (Qwen2-Audio): then the gradient depends on who computes which sample, in the stock run, too.

A `forward` that hands its keyword arguments on to `loss_function` is believed; any other is run twice, on four tokens.

Assumption: text alone is an input that the model takes.
"""

import ast
import inspect
import logging
import textwrap
from typing import Any

import torch
from transformers import Trainer

from hf_dflop.data.packing_check import evaluating
from hf_dflop.data.structure import ModelStructure
from hf_dflop.errors import TrainerError
from hf_dflop.integrations.describe import is_sharded

__all__ = ["check_loss_divisor"]

logger = logging.getLogger(__name__)


def check_loss_divisor(trainer: Any) -> None:
    """Raise when the model's loss does not change with `num_items_in_batch`, and Trainer uses that loss.

    Every rank runs the same forward passes, so that a sharded model may take part.

    Raises:
        TrainerError: with the remedy.
    """
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None or _has_own_loss(type(trainer)):
        return
    model_class = ModelStructure.of(trainer.accelerator.unwrap_model(trainer.model)).model_class
    if _hands_on(model_class):
        return
    try:
        one, two = _losses(trainer)
    except Exception as error:
        logger.warning(
            "whether the loss of %s is divided by num_items_in_batch could not be tried (%s: %s)",
            model_class.__name__,
            type(error).__name__,
            error,
        )
        return
    if abs(one - two) <= 1e-3 * abs(one):
        raise TrainerError(
            f"{model_class.__name__} does not divide its loss by num_items_in_batch, though Trainer believes so: it "
            "returns the mean of a microbatch, and its gradient depends on the grouping. Give the Trainer a "
            "compute_loss_func that divides by num_items_in_batch (in the run that you compare with, too)."
        )


def _has_own_loss(trainer_class: type) -> bool:
    """Whether `compute_loss` is a user's own; those of TRL ask the stock one."""
    owner = next(cls for cls in trainer_class.__mro__ if "compute_loss" in vars(cls))
    return owner is not Trainer and owner.__module__.partition(".")[0] != "trl"


def _hands_on(model_class: type) -> bool:
    """Whether `forward` calls `self.loss_function(..., **kwargs)`, or names the number."""
    try:
        source = textwrap.dedent(inspect.getsource(model_class.forward))  # type: ignore[attr-defined]
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except (OSError, TypeError, SyntaxError):
        return False
    return "num_items_in_batch" in source or any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "loss_function"
        and any(keyword.arg is None for keyword in call.keywords)
        for call in calls
    )


def _losses(trainer: Any) -> tuple[float, float]:
    """The loss of four text tokens, divided by one and by two."""
    model = trainer.model_wrapped if is_sharded(trainer) else trainer.accelerator.unwrap_model(trainer.model)
    structure = ModelStructure.of(model)
    marks = set(structure.image_marks)
    words = [number for number in range(structure.config.get_text_config().vocab_size) if number not in marks][:4]
    ids = torch.tensor([words], device=trainer.args.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with evaluating(model):
        one, two = (float(model(**given, num_items_in_batch=torch.tensor(n, device=ids.device)).loss) for n in (1, 2))
    return one, two
