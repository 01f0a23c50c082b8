"""What differs between versions of transformers and accelerate, in one place.

Only `hf_dflop.integrations` imports this module.
"""

import sys
from typing import Any

from torch.utils.data import DataLoader

__all__ = [
    "calling_trainer",
    "replace_batch_sampler",
    "replace_collator",
    "replace_stream",
    "uses_stateful_dataloader",
]


def calling_trainer() -> Any | None:
    """The `Trainer` whose callback event is running, or `None` outside of one.

    Trainer hands its callbacks the model, the optimizer and the dataloaders, but not itself (transformers 5.17 to
    5.23). What decides exactness (`model_accepts_loss_kwargs`, `compute_loss_func`) and `log` live on it alone, so
    it is looked up on the call stack: the nearest frame whose `self` is a `Trainer`.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def replace_batch_sampler(dataloader: Any, batch_sampler: Any) -> None:
    """Put `batch_sampler` into a prepared dataloader, before its first iterator is made.

    accelerate's `DataLoaderShard` delegates to `base_dataloader`; a plain `DataLoader` is used as it is.
    `DataLoader.__setattr__` forbids the assignment once initialised, though nothing has read the sampler yet.
    """
    base = getattr(dataloader, "base_dataloader", dataloader)
    object.__setattr__(base, "batch_sampler", batch_sampler)


def replace_collator(dataloader: Any, old: Any, new: Any) -> None:
    """Put `new` in the place of the collator `old`, also where Trainer has wrapped it to drop columns."""
    base = getattr(dataloader, "base_dataloader", dataloader)
    if base.collate_fn is old:
        object.__setattr__(base, "collate_fn", new)
    elif getattr(base.collate_fn, "data_collator", None) is old:
        base.collate_fn.data_collator = new


def replace_stream(dataloader: Any, stream: Any, collate: Any) -> None:
    """Make a prepared dataloader over a stream take whole microbatches from `stream`, before its first iterator.

    Without a batch size, a `DataLoader` hands what the dataset yields to the collator as it is; accelerate's
    `skip_first_batches` builds its new dataloader from the same three attributes.
    """
    base = getattr(dataloader, "base_dataloader", dataloader)
    for name, value in (
        ("dataset", stream), ("batch_size", None), ("drop_last", False), ("batch_sampler", None),
        ("collate_fn", collate),
    ):  # fmt: skip
        object.__setattr__(base, name, value)


def uses_stateful_dataloader(dataloader: Any) -> bool:
    """Whether the dataloader keeps torchdata state, which is taken before a callback can install a sampler."""
    base = getattr(dataloader, "base_dataloader", dataloader)
    return type(base) is not DataLoader and hasattr(base, "load_state_dict")
