"""Samples, or tokens, per second over all ranks, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "What was trained on (samples, tokens, label tokens) per second: total ÷ total seconds of all steps."
_KWARGS = """
Args:
    predictions (list of float): for each step, how many samples (or tokens) all ranks together trained on.
    references (list of float): for each step, its seconds.
Returns:
    throughput_per_s (float), mean_step_s (float)
"""


class Throughput(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        done, seconds = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        if not (np.isfinite(done).all() and np.isfinite(seconds).all() and seconds.sum() > 0):
            raise ValueError("counts and step seconds must be finite, and steps must take time.")
        return {"throughput_per_s": float(done.sum() / seconds.sum()), "mean_step_s": float(seconds.mean())}
