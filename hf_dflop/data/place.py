"""Where a run stands in an epoch, written down so that it can go on there, on any number of ranks.

In: microbatches that a rank is done with, and how steps are cut. Out: plain JSON types, and back the number of
microbatches that are done as steps are cut now.
"""

from typing import Any

from hf_dflop.errors import BalanceError, DatasetError

__all__ = ["done_microbatches", "place_of"]


def place_of(
    *, epoch: int, done: int, num_slots: int, samples_per_step: int | None, dataset: str | None
) -> dict[str, Any]:
    """The place after `done` microbatches of a rank, in steps of `num_slots` of them."""
    return {
        "epoch": epoch,
        "step": done // num_slots,
        "slot": done % num_slots,
        "samples_per_step": samples_per_step,
        "dataset": dataset,
    }


def done_microbatches(
    place: dict[str, Any], *, num_slots: int, samples_per_step: int | None, dataset: str | None
) -> int:
    """Microbatches of each rank before `place`, in steps of `num_slots` of them.

    Raises:
        DatasetError: the place is in another dataset.
        BalanceError: steps had another number of samples, or the place lies within a step that is cut otherwise now.
    """
    if place["dataset"] != dataset:
        raise DatasetError(
            f"the state was taken on a dataset with shapes {place['dataset']}, this one has {dataset}: its order "
            "means nothing here. Resume with the dataset of the interrupted run."
        )
    if place["samples_per_step"] != samples_per_step:
        raise BalanceError(
            f"the state was taken with {place['samples_per_step']} samples a step, and a step has {samples_per_step} "
            "here. Keep ranks x accumulation x batch size."
        )
    if place["slot"] >= num_slots:
        raise BalanceError(
            f"the state lies before microbatch {place['slot']} of a step, which has {num_slots} here. Take it between "
            "steps, or keep the number of microbatches."
        )
    return int(place["step"]) * num_slots + int(place["slot"])
