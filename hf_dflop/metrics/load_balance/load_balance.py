"""How evenly ranks compute: the slowest rank's busy seconds ÷ the mean rank's, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Busy seconds of the slowest rank of each step ÷ those of the mean rank; 1 when all are equally busy."
_KWARGS = """
Args:
    predictions (list of list of float): for each step, the seconds that every rank was busy.
Returns:
    load_balance (float): sum over steps of the busiest rank's seconds ÷ sum of the mean rank's; at least 1.
    idle_fraction (float): 1 - 1 ÷ load_balance, the share of the compute time that the mean rank waits.
"""


class LoadBalance(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions: Any) -> dict[str, float]:
        if len({len(step) for step in predictions}) > 1:
            raise ValueError("steps have different numbers of ranks; give every step one number per rank.")
        busy = np.asarray(predictions, dtype=np.float64)
        if not (np.isfinite(busy).all() and (busy >= 0).all() and busy.any()):
            raise ValueError("busy seconds must be finite, >= 0, and not all 0.")
        most, mean = float(busy.max(axis=1).sum()), float(busy.mean(axis=1).sum())
        return {"load_balance": most / mean, "idle_fraction": 1.0 - mean / most}
