"""What a checkpoint remembers of the order of samples, and whether a resumed run may go on with it.

`Trainer` resumes by the number of optimizer steps alone. That gives the remaining samples in the same order as long
as the dataset and the number of samples per step are those of the interrupted run; the number of ranks may differ.
Where they are not, `Trainer` goes on at another place of the epoch without a word. A record in the checkpoint's
`trainer_state.json` tells them apart.

Nor does `Trainer` insist that the weights of the checkpoint were restored. Where a model class saves under other names
than its modules have (LLaVA is one), `Trainer` finds none of them, warns of missing keys, and trains on from the
weights that the script loaded. Sums of a few parameters in the record tell.

In: the state of the Trainer and the record of this run. Out: nothing, or an error with the remedy.

Assumptions: the seed is the interrupted run's (Trainer says nothing about it either).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_dflop.errors import TrainerError

__all__ = ["SampleOrder", "check_resumed", "check_weights", "recalled", "remember", "seal_weights"]

_KEY = "hf_dflop"
_SEALED = 4
"""Parameters whose sums tell whether weights were restored; spread over the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOrder:
    """What decides which samples an optimizer step with a given number uses."""

    dataset: str
    """Hash of the dataset's shapes, in order; of a stream, of its first rows'."""
    num_samples: int
    """Samples of the dataset; -1 for a stream."""
    samples_per_step: int
    """Ranks × microbatches × samples of a stock microbatch."""
    steps_per_epoch: int
    window_steps: int
    """Steps across which giants are paired; 1 for the stock run's steps."""


def remember(state: Any, order: SampleOrder, **more: Any) -> None:
    """Put the record where `Trainer` saves it with the next checkpoint (`TrainerState.stateful_callbacks`)."""
    state.stateful_callbacks[_KEY] = {"args": {}, "attributes": {**asdict(order), **more}}


def recalled(state: Any) -> dict[str, Any] | None:
    """The record of the checkpoint that the state was loaded from; `None` for a run without the callback."""
    found = (state.stateful_callbacks or {}).get(_KEY)
    return dict(found["attributes"]) if found is not None else None


def check_resumed(state: Any, order: SampleOrder, *, skips: bool) -> None:
    """Raise when a resumed run would not use the remaining samples of the interrupted one.

    Args:
        state (`TrainerState`): of the run that begins; `global_step` is 0 unless it was resumed.
        order ([`SampleOrder`]): of this run.
        skips (`bool`): the samples of the begun epoch that were used are skipped (`ignore_data_skip=False`).

    Raises:
        TrainerError: the checkpoint is of another dataset, or of steps of another size that do not end where this
            run would go on.
    """
    saved = recalled(state)
    if state.global_step == 0 or saved is None:
        return
    if saved["dataset"] != order.dataset or saved["num_samples"] != order.num_samples:
        raise TrainerError(
            f"the checkpoint was trained on {saved['num_samples']} samples with the fingerprint {saved['dataset']!r}, "
            f"and this dataset has {order.num_samples} with {order.dataset!r}: which samples remain cannot be told. "
            "Resume with the dataset of the interrupted run, in its order, or start a new run from its weights "
            "(from_pretrained)."
        )
    if not skips:
        return
    if saved["window_steps"] != order.window_steps:
        raise TrainerError(
            f"the checkpoint paired samples across {saved['window_steps']} steps, and this run does so across "
            f"{order.window_steps}: samples would be used twice or not at all. Keep window_steps, or set "
            "ignore_data_skip=True to begin the epoch anew."
        )
    if order.num_samples < 0 and saved["samples_per_step"] != order.samples_per_step:
        raise TrainerError(
            f"the checkpoint was trained with {saved['samples_per_step']} samples of the stream per optimizer step, "
            f"and this run uses {order.samples_per_step}. Keep ranks × gradient_accumulation_steps × "
            f"per_device_train_batch_size = {saved['samples_per_step']}, or set ignore_data_skip=True to read the "
            "stream from its beginning."
        )
    if saved["samples_per_step"] != order.samples_per_step:
        was = divmod(state.global_step, saved["steps_per_epoch"])
        goes_on = divmod(state.global_step, order.steps_per_epoch)
        was_at, goes_on_at = was[1] * saved["samples_per_step"], goes_on[1] * order.samples_per_step
        if (was[0], was_at) != (goes_on[0], goes_on_at):
            raise TrainerError(
                f"the checkpoint was trained with {saved['samples_per_step']} samples per optimizer step, and this "
                f"run uses {order.samples_per_step}. It stopped in epoch {was[0]} after {was_at} samples, and Trainer "
                f"would go on in epoch {goes_on[0]} after {goes_on_at}, so that samples are used twice or not at all. "
                f"Keep ranks × gradient_accumulation_steps × per_device_train_batch_size = "
                f"{saved['samples_per_step']}, or set ignore_data_skip=True to begin an epoch anew."
            )


def seal_weights(model: torch.nn.Module) -> dict[str, float]:
    """Name and type → sum of magnitudes of a few trained parameters; nothing of sharded ones. Waits for the device."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not trained or any(hasattr(p, "full_tensor") or p.device.type == "meta" for _, p in trained):
        return {}
    chosen = trained[:: max(len(trained) // _SEALED, 1)][: _SEALED - 1] + trained[-1:]
    return {f"{name} ({p.dtype})": float(p.detach().double().abs().sum()) for name, p in chosen}


def check_weights(state: Any, model: torch.nn.Module) -> None:
    """Raise when a resumed run does not have the weights of the checkpoint.

    Raises:
        TrainerError: a trained parameter of the interrupted run has another value.
    """
    sealed = (recalled(state) or {}).get("weights")
    if state.global_step == 0 or not sealed:
        return
    found = seal_weights(model)
    for name, expected in sealed.items():
        if name in found and not math.isclose(found[name], expected, rel_tol=1e-10):
            raise TrainerError(
                f"the checkpoint of step {state.global_step} was resumed, but {name} does not have its weights (sum "
                f"of magnitudes {found[name]:.9g}, {expected:.9g} when it was saved). Trainer restores by name, and "
                "this model saves under other names than it trains (it warned of missing keys). Build the model with "
                "from_pretrained(checkpoint folder) before resuming."
            )
