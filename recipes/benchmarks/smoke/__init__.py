"""The regression guard: small versions of the topics, whose *ratios* must stay within stored bounds.

Ratios and not seconds, because seconds are the machine's: a partition ÷ its bound, a sampler's simulated efficiency ÷
another's, scheduling at 4,096 samples ÷ at 1,024. Nothing is downloaded.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

__all__ = ["BOUNDS", "MEASURES", "check", "main"]

BOUNDS = Path(__file__).with_name("bounds.json")


def _partition() -> dict[str, float]:
    from recipes.benchmarks.partition.__main__ import measure

    rows, _ = measure(((128, 16), (512, 64)), (1.0,), seeds=5, cp_sat_seeds=0)
    ours = [row for row in rows if row["solver"] == "hf_dflop, both costs"]
    llm = [row for row in rows if row["solver"] == "LPT on LLM cost"]
    return {
        "partition_load_to_bound": mean(row["load_to_bound"] for row in ours),
        "partition_lpt_llm_to_ours": mean(row["load_to_bound"] for row in llm)
        / mean(row["load_to_bound"] for row in ours),
    }


def _scale() -> dict[str, float]:
    from recipes.benchmarks.scale.__main__ import measure, scheduling

    rows = measure((8, 64), 1024, 1, {"onevision": 1.0})

    def of(sampler: str, packed: bool) -> float:
        return mean(row["efficiency"] for row in rows if row["sampler"] == sampler and row["packed"] == packed)

    others = {row["sampler"] for row in rows} - {"hf_dflop"}
    times = {
        row["num_samples"]: median(row["seconds"])
        for row in scheduling((1024, 4096), repeats=3)
        if row["packed"] and row["sync"] == "step"
    }
    return {
        "simulated_packed_to_stock": of("hf_dflop", True) / of("stock", False),
        "simulated_packed_to_best_other_packed": of("hf_dflop", True) / max(of(name, True) for name in others),
        "simulated_efficiency_packed": of("hf_dflop", True),
        "scheduling_4096_to_1024": times[4096] / times[1024],
    }


def _samplers() -> dict[str, float]:
    from recipes.benchmarks.scale.simulate import SIMULATED, draw_epoch, efficiency

    epoch = draw_epoch("chart_doc", 16, num_slots=3, batch_size=5, num_steps=2, seed=3, vision_share=0.7)
    values = {
        name: efficiency(epoch, deal(epoch, False, "step"), padded=False)["step"] for name, deal in SIMULATED.items()
    }
    best = max(value for name, value in values.items() if name != "hf_dflop")
    return {"chart_doc_packed_to_best_other": values["hf_dflop"] / best}


MEASURES: list[Callable[[], dict[str, float]]] = [_partition, _scale, _samplers]
"""Each gives named ratios."""


def check(found: dict[str, float], bounds: dict[str, list[float | None]]) -> list[str]:
    """What is outside of its bounds `[lowest, highest]`, or has none, in sentences."""
    wrong = [f"{name} was measured and has no bound in {BOUNDS.name}" for name in found if name not in bounds]
    for name, (low, high) in bounds.items():
        if name not in found:
            wrong.append(f"{name} has a bound and was not measured")
        elif low is not None and found[name] < low:
            wrong.append(f"{name} is {found[name]:.4g}; it must be at least {low}")
        elif high is not None and found[name] > high:
            wrong.append(f"{name} is {found[name]:.4g}; it must be at most {high}")
    return wrong


def main() -> None:
    begin = time.monotonic()
    found: dict[str, float] = {}
    for measure in MEASURES:
        found |= measure()
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    for name, value in found.items():
        low, high = bounds.get(name, (None, None))
        print(f"[bench] {name}: {value:.4g} (at least {low}, at most {high})")
    print(f"[bench] {time.monotonic() - begin:.0f} s")
    wrong = check(found, bounds)
    if wrong:
        raise SystemExit("[bench] out of bounds:\n  " + "\n  ".join(wrong))
