"""Module curves of the model on this device, and how far they are off on sizes that were not fitted.

In: settings, where to keep the profile. Out: the `ModelProfile` (the kept one, if there is one) and rows of kind
`module`: errors, and each held-out point with its own.
"""

from pathlib import Path

import numpy as np

from hf_dflop.cost import ModelProfile
from hf_dflop.profile.measure import measure_model
from recipes.benchmarks.common.results import Row, rounded
from recipes.benchmarks.gpu.model import model_config
from recipes.benchmarks.gpu.settings import GpuSettings

__all__ = ["measure_curves", "module_rows"]


def measure_curves(settings: GpuSettings, path: Path) -> ModelProfile:
    """Measure the model, or read what was measured before."""
    if not path.exists():
        profile = measure_model(
            model_config(settings),
            device=settings.device,
            dtype=settings.dtype,
            attn_implementation="sdpa",
            max_tokens=settings.max_tokens,
            max_patches=settings.max_patches,
            max_points=settings.curve_points,
            num_held_out=settings.curve_held_out,
            budget_s=settings.curve_budget_s,
            seed=settings.seed,
            progress=False,
        )
        profile.save(path)
    return ModelProfile.load(path)


def module_rows(profile: ModelProfile) -> list[Row]:
    """One row for each module that was measured."""
    rows: list[Row] = []
    for module in dict.fromkeys(point.group for point in profile.measurements):
        own = [point for point in profile.measurements if point.group == module]
        held = [point for point in own if point.held_out]
        errors = profile.relative_errors(group=module)
        if not errors.size:
            continue
        rows.append(
            {
                "kind": "module",
                "module": module,
                "num_fitted": len(own) - len(held),
                "num_held_out": len(held),
                "median_error": float(np.median(errors)),
                "p95_error": float(np.percentile(errors, 95)),
                "most_tokens": int(max(point.tokens for point in own)),
                "tokens_seconds_error": [
                    [point.tokens, point.forward_s + point.backward_s, float(error)]
                    for point, error in zip(held, errors, strict=True)
                ],
            }
        )
    return [rounded(row) for row in rows]
