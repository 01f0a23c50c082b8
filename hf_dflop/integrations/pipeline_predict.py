"""What evaluation tells beyond the loss: predictions and labels of a whole dataset, on every rank.

In: microbatches' logits, which the ranks of the last stage have. Out: predictions and labels as `Trainer` joins them,
in the order of the dataset, padded with -100 on the right.

Assumption: every rank's host has room for the predictions of the whole dataset; `preprocess_logits_for_metrics` makes
them small.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hf_dflop.errors import TrainerError
from hf_dflop.pipeline import PipelineModel, StepBatch, StepResult

__all__ = ["Predictions"]

_PADDING = -100


class Predictions:
    """Collects rows of predictions.

    Args:
        pipe ([`PipelineModel`]): whose predictions they are.
        preprocess (`Callable`, *optional*): `preprocess_logits_for_metrics` of Trainer: logits, labels → a tensor.
    """

    def __init__(self, pipe: PipelineModel, preprocess: Callable[..., Any] | None = None) -> None:
        self._pipe, self._preprocess = pipe, preprocess
        self._rows: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, batch: StepBatch, result: StepResult) -> None:
        """Keep what a call gave on this rank.

        Raises:
            TrainerError: a microbatch has not one row for each sample, or `preprocess` gives no tensor.
        """
        for microbatch, logits in result.logits.items():
            inputs = batch.text[microbatch]
            assert inputs is not None
            labels, samples = inputs["labels"], batch.samples[microbatch][self._pipe.place.replica]
            if len(labels) != len(samples):
                raise TrainerError(
                    f"a packed microbatch has {len(samples)} samples in {len(labels)} rows: predictions and "
                    "compute_metrics need a row for each; use a VisionLanguageCollator."
                )
            made = logits if self._preprocess is None else self._preprocess(logits, labels.to(logits.device))
            if not torch.is_tensor(made) or len(made) != len(samples):
                raise TrainerError(
                    f"preprocess_logits_for_metrics gave a {type(made).__name__}; give one tensor with a row for each "
                    "sample."
                )
            rows = _to_numpy(made)
            self._rows.extend(zip(samples, rows, _to_numpy(labels), strict=True))

    def join(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Predictions and labels of all ranks, on all ranks; they all call it."""
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, self._rows)
        rows = sorted((row for rank in told for row in rank), key=lambda row: row[0])
        if not rows:
            return None, None
        return _stack([made for _, made, _ in rows]), _stack([labels for _, _, labels in rows])


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    if rows[0].ndim == 0:
        return np.stack(rows)
    stacked = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), _PADDING, dtype=rows[0].dtype)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked
