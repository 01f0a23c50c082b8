"""Makes an `Accelerator`'s own methods right for a model that is spread over ranks.

In: an `Accelerator`, a pipeline, its optimizer. Out: the same accelerator, on which

    clip_grad_norm_       clips by the norm of the whole model
    prepare(scheduler)    steps once for each optimizer step, not once for each process
    get_state_dict        gathers the whole model on rank 0 (`save_model` goes through it)
    save_state            writes a stock model and the optimizer's state by name; load_state reads them, under any plan

Assumption: every rank calls them.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer

from hf_dflop.errors import TrainerError
from hf_dflop.integrations.pipeline_checkpoint import load_weights
from hf_dflop.integrations.pipeline_state import load_optimizer, save_optimizer
from hf_dflop.pipeline import PipelineModel

__all__ = ["put_right"]


def put_right(accelerator: Any, pipe: PipelineModel, optimizer: AcceleratedOptimizer) -> None:
    """Change the accelerator, once.

    Raises:
        TrainerError: it runs a pipeline already.
    """
    if getattr(accelerator, "_dflop_pipe", None) is not None:
        raise TrainerError("this Accelerator runs a pipeline already; make another one for a second model.")
    accelerator._dflop_pipe = pipe
    accelerator.clip_grad_norm_ = _clipping(accelerator, pipe, optimizer)
    accelerator.prepare_scheduler = _scheduling(accelerator.prepare_scheduler, optimizer)
    accelerator.get_state_dict = _gathering(accelerator.get_state_dict, pipe)

    def save(models: Any, weights: Any, folder: str) -> None:
        pipe.save_pretrained(folder)
        save_optimizer(pipe, optimizer, folder)
        if pipe.place.rank == 0:
            pipe.plan.save(f"{folder}/plan.json")
        dist.barrier()

    def load(models: Any, folder: str) -> None:
        load_weights(pipe, folder)
        load_optimizer(pipe, optimizer, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _clipping(accelerator: Any, pipe: PipelineModel, optimizer: AcceleratedOptimizer) -> Any:
    stock = accelerator.clip_grad_norm_
    own = {id(parameter) for parameter in pipe.parameters()}

    @functools.wraps(stock)
    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        mine = own & {id(parameter) for parameter in given}
        if not mine:
            return stock(given, max_norm, norm_type=norm_type)
        if mine != own or len(given) != len(own) or norm_type != 2:
            raise TrainerError(
                f"clip_grad_norm_ got {len(given)} parameters, norm_type={norm_type}; on a pipeline it takes all of "
                "model.parameters() and the 2-norm, since the norm is one over all ranks."
            )
        accelerator.unscale_gradients(optimizer)
        return pipe.clip_grad_norm_(max_norm)

    return clip_grad_norm_


def _scheduling(stock: Any, optimizer: AcceleratedOptimizer) -> Any:
    @functools.wraps(stock)
    def prepare_scheduler(scheduler: Any) -> Any:
        prepared = stock(scheduler)
        driven = getattr(scheduler, "optimizer", None)
        if getattr(driven, "optimizer", driven) is optimizer.optimizer:
            prepared.split_batches = True  # by which AcceleratedScheduler knows that one step is one step
            prepared.optimizers = [optimizer]  # where it looks for steps that were skipped
        return prepared

    return prepare_scheduler


def _gathering(stock: Any, pipe: PipelineModel) -> Any:
    @functools.wraps(stock)
    def get_state_dict(model: Any, unwrap: bool = True) -> Any:
        return pipe.gather_state_dict() if model is pipe else stock(model, unwrap)

    return get_state_dict
