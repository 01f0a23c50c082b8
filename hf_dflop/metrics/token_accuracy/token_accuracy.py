"""Share of label tokens whose most likely prediction is right, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of label tokens whose most likely prediction is right; references of -100 do not count."
_KWARGS = """
Args:
    predictions (list of int): predicted token ids, already shifted so that they stand beside their reference.
    references (list of int): label token ids; -100 is ignored.
Returns:
    token_accuracy (float), num_label_tokens (int)
"""


class TokenAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float | int]:
        found, expected = np.asarray(predictions), np.asarray(references)
        counted = expected != -100
        total = int(counted.sum())
        if total == 0:
            raise ValueError("no reference but -100: there is no label token to score.")
        right = int((found[counted] == expected[counted]).sum())
        return {"token_accuracy": right / total, "num_label_tokens": total}
