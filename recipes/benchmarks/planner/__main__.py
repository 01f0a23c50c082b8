"""Seconds and memory of a planning for 64, 1,024 and 16,384 GPUs, each in a process of its own."""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recipes.benchmarks.common.results import Row, make_result, save

LIMITS = {64: 2.0, 1024: 20.0, 16384: 120.0}
"""GPUs -> seconds on one core that a planning should take at most."""
MODELS = ("ov-qwen2.5-7b", "ov-qwen2.5-72b", "internvl2.5-72b")
"""Names of `recipes.paper.settings`."""


def plan_once(model: str, num_gpus: int) -> Row:
    """Plan in this process; the compiled functions are loaded first, by a planning for 8 GPUs."""
    from hf_dflop.cost import ModelSpec
    from hf_dflop.plan.make_plan import describe_layout, make_plan
    from recipes.paper.mix import draw_mix
    from recipes.paper.settings import SAMPLES_PER_GPU, SCALING, VIT_6B_7B, a100_cluster

    setting = next(one for one in SCALING if one.name == model)
    shapes = draw_mix(setting.mix, 20_000)
    begin = time.process_time()
    small = ModelSpec.from_config(VIT_6B_7B.config)
    make_plan(small, draw_mix(VIT_6B_7B.mix, 500), a100_cluster(8), global_batch_size=32)
    load_s = time.process_time() - begin
    cpu, wall = time.process_time(), time.perf_counter()
    spec = ModelSpec.from_config(setting.config)
    planning = make_plan(spec, shapes, a100_cluster(num_gpus), global_batch_size=SAMPLES_PER_GPU * num_gpus)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "kind": "planning",
        "model": model,
        "num_gpus": num_gpus,
        "num_samples": SAMPLES_PER_GPU * num_gpus,
        "cpu_s": float(f"{cpu:.3g}"),
        "wall_s": float(f"{wall:.3g}"),
        "load_s": float(f"{load_s:.3g}"),
        "peak_bytes": _peak_bytes(),
        "num_layouts": planning.result.num_layouts,
        "num_bounded": planning.result.num_bounded,
        "winner": describe_layout(planning.plan),
        "step_s": float(f"{planning.score.mean_s:.4g}"),
    }


def _peak_bytes() -> int:
    """Peak of this program alone: ru_maxrss begins with that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(models: list[str], sizes: list[int], repeats: int) -> list[Row]:
    """One row for each model, size and repetition."""
    rows: list[Row] = []
    for model in models:
        for num_gpus in sizes:
            for _ in range(repeats if num_gpus < max(LIMITS) else 1):
                command = [sys.executable, "-m", "recipes.benchmarks.planner", "--one", model, str(num_gpus)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                print(
                    f"[bench] {model}, {num_gpus:,} GPUs: {row['cpu_s']:.3g} s of CPU ({row['wall_s']:.3g} s), "
                    f"{row['peak_bytes'] / 2**30:.2f} GiB, {row['winner']}",
                    flush=True,
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.planner", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--gpus", nargs="+", type=int, default=list(LIMITS), help="sizes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of the smaller sizes (default: %(default)s)")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "GPUS"), help="plan once and print the row as JSON")
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(plan_once(given.one[0], int(given.one[1]))))
        return
    rows = measure(given.models, given.gpus, given.repeats)
    if not given.no_save:
        result = make_result(
            "planner",
            rows,
            command="python -m recipes.benchmarks.planner",
            settings={"gpus": given.gpus, "samples_per_gpu": 8, "repeats": given.repeats, "gpu": "A100-80GB"},
            notes=[f"{size:,} GPUs were left out of this run" for size in LIMITS if size not in given.gpus],
        )
        print(f"[bench] {save(result)}")


if __name__ == "__main__":
    main()
