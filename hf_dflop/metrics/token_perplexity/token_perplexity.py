"""exp of the mean negative log-likelihood of the label tokens, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Perplexity over label tokens: exp of their mean negative log-likelihood."
_KWARGS = """
Args:
    predictions (list of float): negative log-likelihood of each position, in nats.
    references (list of int): label token ids; positions with -100 are ignored.
Returns:
    token_perplexity (float), mean_nll (float)
"""


class TokenPerplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        counted = np.asarray(references) != -100
        if not counted.any():
            raise ValueError("no reference but -100: there is no label token to score.")
        mean = float(np.asarray(predictions, dtype=np.float64)[counted].mean())
        return {"token_perplexity": float(np.exp(mean)), "mean_nll": mean}
