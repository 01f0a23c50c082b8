"""Simulated efficiency of every sampler from 8 to 4,096 ranks, and how long a step takes to schedule."""

import argparse
import itertools
import time

import numpy as np

from hf_dflop.balance import assign, warm_up
from recipes.benchmarks.common.results import Row, make_result, save
from recipes.benchmarks.common.samplers import Deal
from recipes.benchmarks.scale.simulate import SIMULATED, draw_epoch, efficiency

RANKS = (8, 64, 512, 4096)
SYNCS = ("step", "stage")
MAX_RANKS = {"batch_rebalance": 512}
"""Samplers that are not run beyond so many ranks: grouping one step would take minutes there."""
VISION_SHARES = {"onevision": 1.0, "chart_doc": 0.4}
"""Encoder seconds ÷ LLM seconds for each mix."""


def measure(ranks: tuple[int, ...], samples: int, seeds: int, mixes: dict[str, float]) -> list[Row]:
    """Efficiency rows of every mix, number of ranks, sampler, collator and way of meeting.

    Args:
        samples (`int`): samples of an epoch at least; few ranks get more steps, and every number of ranks one.
    """
    rows: list[Row] = []
    for mix, share in mixes.items():
        for num_ranks in ranks:
            num_slots, batch_size = 2, 4
            steps = max(1, samples // (num_ranks * num_slots * batch_size))
            for seed in range(seeds if num_ranks < ranks[-1] else 1):
                epoch = draw_epoch(
                    mix, num_ranks, num_slots=num_slots, batch_size=batch_size, num_steps=steps, seed=seed,
                    vision_share=share,
                )  # fmt: skip
                for name, deal in SIMULATED.items():
                    if num_ranks > MAX_RANKS.get(name, num_ranks):
                        continue
                    dealt: dict[tuple[str, bool], Deal] = {}
                    begin = time.process_time()
                    for sync, padded in itertools.product(SYNCS, (True, False)):
                        if name == "hf_dflop" or not dealt:
                            dealt[sync, padded] = deal(epoch, padded, sync)
                        else:  # the others know nothing of collators and of where ranks meet
                            dealt[sync, padded] = next(iter(dealt.values()))
                    spent = (time.process_time() - begin) / (len(dealt) if name == "hf_dflop" else 1)
                    for (sync, padded), found in dealt.items():
                        value = efficiency(epoch, found, padded=padded)[sync]
                        rows.append(
                            {
                                "kind": "efficiency",
                                "mix": mix,
                                "num_ranks": num_ranks,
                                "seed": seed,
                                "sampler": name,
                                "packed": not padded,
                                "sync": sync,
                                "efficiency": float(f"{value:.5g}"),
                                "deal_s_per_step": float(f"{spent / steps:.4g}"),
                            }
                        )
            print(f"[bench] {mix}, {num_ranks} ranks, {steps} steps", flush=True)
    return rows


def scheduling(sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """Seconds to group one step of `size` samples, for each way of meeting, padded and packed."""
    rows: list[Row] = []
    for padded in (True, False):
        for sync in SYNCS:
            warm_up(objective=sync, padded=padded)
            for size in sizes:
                num_ranks = max(2, size // 8)
                epoch = draw_epoch(
                    "onevision", num_ranks, num_slots=2, batch_size=4, num_steps=1, seed=0, vision_share=1.0
                )
                seconds = []
                for seed in range(repeats):
                    begin = time.process_time()
                    assign(
                        epoch.vision_s, epoch.llm_s, num_ranks=num_ranks, num_slots=2, objective=sync, padded=padded,
                        seed=seed,
                    )  # fmt: skip
                    seconds.append(time.process_time() - begin)
                rows.append(
                    {
                        "kind": "scheduling",
                        "num_samples": len(epoch.shapes),
                        "num_ranks": num_ranks,
                        "packed": not padded,
                        "sync": sync,
                        "seconds": [float(f"{value:.4g}") for value in np.array(seconds)],
                    }
                )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.scale", description=__doc__)
    parser.add_argument("--samples", type=int, default=4096, help="of an epoch, at least (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="epochs drawn for each cell (default: %(default)s)")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    given = parser.parse_args(arguments)
    rows = measure(RANKS, given.samples, given.seeds, VISION_SHARES)
    rows += scheduling((64, 256, 1024, 4096, 16384), repeats=3)
    if not given.no_save:
        result = make_result(
            "scale",
            rows,
            command="python -m recipes.benchmarks.scale",
            settings={
                "samples": given.samples,
                "seeds": given.seeds,
                "batch_size": 4,
                "slots": 2,
                "vision_share": VISION_SHARES,
            },
        )
        print(f"[bench] {save(result)}")


if __name__ == "__main__":
    main()
