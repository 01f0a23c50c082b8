"""Which module takes longer than predicted: measured seconds ≈ a × vision + b × LLM over many microbatches.

Input: measured and predicted seconds of microbatches, and the vision share of each prediction. Output: (a, b), robust
against single spikes, or nothing where the microbatches are too alike to tell the modules apart.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["module_factors"]

_MIN_MICROBATCHES = 12
_MIN_SHARE_SPREAD = 0.05
"""Standard deviation of the vision share from which the two can be told apart."""

FloatArray = npt.NDArray[np.float64]


def module_factors(
    measured: FloatArray, predicted: FloatArray, vision_share: FloatArray
) -> tuple[float, float] | None:
    """Measured ÷ predicted of (vision, LLM); arrays `(num_microbatches,)`."""
    known = np.isfinite(vision_share) & np.isfinite(measured) & (measured > 0)
    if known.sum() < _MIN_MICROBATCHES or vision_share[known].std() < _MIN_SHARE_SPREAD:
        return None
    share, ratio = vision_share[known], (measured / predicted)[known]
    columns = np.column_stack([share, 1.0 - share])
    weight = np.ones_like(ratio)
    for _ in range(20):  # Huber weights, iteratively
        found = np.linalg.lstsq(columns * weight[:, None], ratio * weight, rcond=None)[0]
        error = np.abs(ratio - columns @ found)
        noise = max(1.4826 * float(np.median(error)), 1e-3)
        weight = np.sqrt(np.minimum(1.0, 1.345 * noise / np.maximum(error, 1e-12)))
    return max(float(found[0]), 0.0), max(float(found[1]), 0.0)
