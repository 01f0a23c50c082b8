"""Share of the step time that the mean rank waits for the others, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Seconds that the mean rank waited for the slowest one ÷ step seconds, over all steps together."
_KWARGS = """
Args:
    predictions (list of list of float): for each step, the seconds that every rank waited.
    references (list of float): for each step, its seconds.
Returns:
    idle_fraction (float), idle_s (float): the latter is the mean over ranks and steps.
"""


class IdleFraction(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("float64"),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if len({len(step) for step in predictions}) > 1:
            raise ValueError("steps have different numbers of ranks; give every step one number per rank.")
        idle, step = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        if not (np.isfinite(idle).all() and np.isfinite(step).all() and step.sum() > 0):
            raise ValueError("idle and step seconds must be finite, and steps must take time.")
        return {"idle_fraction": float(idle.mean() / step.mean()), "idle_s": float(idle.mean())}
