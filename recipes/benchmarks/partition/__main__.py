"""Partition synthetic global batches with every installed solver: largest load ÷ lower bound, and seconds."""

import argparse
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import lower_bound, partition
from recipes.benchmarks.common.mixes import draw_mix
from recipes.benchmarks.common.results import Row, make_result, save
from recipes.benchmarks.partition.solvers import SOLVERS

SIZES = ((64, 8), (128, 16), (256, 32), (512, 64), (1024, 128), (4096, 256))
RATIOS = (1.0, 0.4)
NOTES = {
    "seq-len-balance": "not measured: it is built from Rust sources whose crates could not be had here. Its "
    "Karmarkar–Karp is the algorithm that prtpy runs",
}


def costs_of(mix: str, num_samples: int, ratio: float, seed: int) -> npt.NDArray[np.float64]:
    """Vision and LLM costs of a global batch, `(num_samples, 2)`; vision sums to `ratio` × LLM.

    A 7B LLM spends 14e9 FLOPs on a token and 200e3 on a token squared (28 layers, 3584 wide, causal); a tile of the
    encoder always costs the same.
    """
    samples = draw_mix(mix, num_samples, seed)
    tokens = samples.llm_tokens.astype(np.float64)
    llm = 14e9 * tokens + 200e3 * tokens**2
    vision = samples.tiles / max(samples.tiles.mean(), 1e-9) * ratio
    return np.stack([vision, llm / llm.mean()], axis=1)


def measure(
    sizes: Any, ratios: Any, seeds: int, cp_sat_seeds: int = 1, mix: str = "onevision"
) -> tuple[list[Row], list[str]]:
    """Rows of the result, and notes on solvers that did not run."""
    rows: list[Row] = []
    notes = [f"{name}: {why}" for name, why in NOTES.items()]
    absent: set[str] = set()
    partition(np.ones((8, 2)), 2)  # compile
    for ratio in ratios:
        for num_samples, num_buckets in sizes:
            for seed in range(seeds):
                costs = costs_of(mix, num_samples, ratio, seed)
                bound = lower_bound(costs, num_buckets)
                for solver in SOLVERS:
                    is_solver = solver.package == "ortools"
                    if solver.package in absent or num_samples > solver.max_samples:
                        continue
                    if is_solver and (seed >= cp_sat_seeds or ratio != ratios[0]):
                        continue
                    begin = time.process_time()
                    try:
                        bucket = solver.solve(costs, num_buckets, seed)
                    except ImportError:
                        absent.add(solver.package)
                        notes.append(f"{solver.package}: not installed here, so not measured")
                        continue
                    except RuntimeError as error:
                        notes.append(f"{solver.name} at {num_samples} samples, {num_buckets} buckets: {error}")
                        continue
                    seconds = time.process_time() - begin
                    loads = np.zeros((num_buckets, 2))
                    np.add.at(loads, bucket, costs)
                    rows.append(
                        {
                            "kind": "partition",
                            "solver": solver.name,
                            "components": solver.components,
                            "num_samples": num_samples,
                            "num_buckets": num_buckets,
                            "work_ratio": ratio,
                            "seed": seed,
                            "load_to_bound": float(f"{loads.max() / bound:.6g}"),
                            "seconds": float(f"{seconds:.4g}"),
                        }
                    )
            print(f"[bench] work ratio {ratio}, {num_samples} samples in {num_buckets} buckets", flush=True)
    return rows, notes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.partition", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="global batches of each size (default: %(default)s)")
    parser.add_argument("--cp-sat-seeds", type=int, default=2, help="of them for CP-SAT, 10 s each; %(default)s")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    given = parser.parse_args(arguments)
    rows, notes = measure(SIZES, RATIOS, given.seeds, given.cp_sat_seeds)
    if not given.no_save:
        result = make_result(
            "partition",
            rows,
            command="python -m recipes.benchmarks.partition",
            settings={"mix": "onevision", "seeds": given.seeds, "cp_sat_seeds": given.cp_sat_seeds},
            notes=notes,
            packages=("ortools", "prtpy", "binpacking", "seqpacker"),
        )
        print(f"[bench] {save(result)}")


if __name__ == "__main__":
    main()
