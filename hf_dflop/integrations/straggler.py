"""The steps since the last log → one line that names who was waited for, and the microbatch that surprised most."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_dflop.integrations.measured import MeasuredStep

__all__ = ["straggler_line"]


def straggler_line(steps: Sequence[MeasuredStep], costs: Any = None) -> str | None:
    """Which rank the others waited for, what the step's seconds went to, and the most underestimated microbatch.

    Args:
        steps (`Sequence[MeasuredStep]`): at least one.
        costs (`CostVersions`, *optional*): predictions are compared where there are any.

    Returns:
        `str | None`: nothing where busy and waiting time cannot be told apart, or one rank runs alone.
    """
    data, busy, sync, step_s = np.moveaxis(np.stack([step.seconds for step in steps]), 2, 0)  # (num_steps, num_ranks)
    if busy.shape[1] < 2 or not (np.isfinite(busy).all() and np.isfinite(sync).all()):
        return None
    last = np.bincount(busy.argmax(axis=1), minlength=busy.shape[1])
    rank = int(last.argmax())
    whole = step_s.mean()
    idle = (sync - sync.min(axis=1, keepdims=True)).mean()
    line = (
        f"steps {steps[0].step}-{steps[-1].step}: waited for rank {rank} in {last[rank]} of {len(steps)} steps; "
        f"the mean rank computes {busy.mean() / whole:.0%}, waits {idle / whole:.0%}, communicates "
        f"{sync.min(axis=1).mean() / whole:.0%} and loads data {data.mean() / whole:.0%} of {whole * 1e3:.0f} ms"
    )
    surprise = _surprise(steps, costs) if costs is not None else None
    return line if surprise is None else f"{line}; {surprise}"


def _surprise(steps: Sequence[MeasuredStep], costs: Any) -> str | None:
    """The microbatch with the most seconds beyond its prediction."""
    found: list[tuple[int, float, float, float, int, int, int, list[int]]] = []
    for step in steps:
        if step.plan is None or step.plan.cost_version is None:
            continue
        version = step.plan.cost_version
        for r, slots in enumerate(step.slot_s):
            microbatches = step.plan.microbatches(r)
            modules = costs.module_seconds(microbatches, version)
            for s, (samples, (vision, llm)) in enumerate(zip(microbatches, modules, strict=True)):
                predicted = float(vision + llm) + version.model.per_microbatch_s
                if np.isfinite(slots[s]) and slots[s] > 0 and predicted > 0:
                    share = float(vision / (vision + llm)) if vision + llm else 0.0
                    found.append((version.number, float(slots[s]), predicted, share, step.step, r, s, samples))
    if not found:
        return None
    numbers = np.array([entry[0] for entry in found])
    measured = np.array([entry[1] for entry in found])
    expected = np.array([entry[2] for entry in found])
    for number in set(numbers.tolist()):  # a version may be in units of its own
        own = numbers == number
        expected[own] *= np.median(measured[own] / expected[own])
    worst = int((measured - expected).argmax())
    _, _, _, share, step_number, r, s, samples = found[worst]
    module = f"{share:.0%} of it vision" if share >= 0.5 else f"{1 - share:.0%} of it LLM"
    shown = ", ".join(map(str, samples[:8])) + (f", ... ({len(samples)})" if len(samples) > 8 else "")
    return (
        f"most beyond its prediction: step {step_number}, rank {r}, microbatch {s}, "
        f"{measured[worst] * 1e3:.0f} ms for {expected[worst] * 1e3:.0f} ms ({module}), samples {shown}"
    )
