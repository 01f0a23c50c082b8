"""Metrics as local `evaluate` modules: nothing is fetched.

token_accuracy     share of label tokens whose most likely prediction is right
token_perplexity   exp of the mean negative log-likelihood of the label tokens
load_balance       busy seconds of the slowest rank ÷ those of the mean rank
idle_fraction      share of the step that the mean rank waits for the others
throughput         samples or tokens per second
"""

from pathlib import Path
from typing import Any

__all__ = ["METRICS", "load"]

METRICS: tuple[str, ...] = ("token_accuracy", "token_perplexity", "load_balance", "idle_fraction", "throughput")


def load(name: str, **kwargs: Any) -> Any:
    """Load one of `METRICS` with `evaluate.load`; `kwargs` go there.

    Raises:
        ValueError: no such metric; names the ones there are.

    Example:
        >>> from hf_dflop import metrics
        >>> metrics.load("token_accuracy").compute(predictions=[5, 6, 7], references=[5, 0, -100])
        {'token_accuracy': 0.5, 'num_label_tokens': 2}
    """
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}; there are {', '.join(METRICS)}.")
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"), **kwargs)
