"""Measure the pipeline topic; launched by the runner in two processes. A finished part leaves a JSON behind."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.benchmarks.common.results import Row
from recipes.benchmarks.pipeline.costs import Costs, both, measure_links
from recipes.benchmarks.pipeline.engines import compare_engines, compare_padding
from recipes.benchmarks.pipeline.ingredients import prepare, say
from recipes.benchmarks.pipeline.prediction import predict_and_run
from recipes.benchmarks.pipeline.settings import PARTS, PipelineSettings
from recipes.demo.settings import write_whole

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="JSON of PipelineSettings")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    settings = PipelineSettings.load(given.settings)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux: a process that wanders from core to core adds noise
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        raise SystemExit(f"{dist.get_world_size()} processes were launched; the topic compares plans for two.")
    ingredients = prepare(settings)
    output = settings.output_dir
    begin = time.monotonic()
    costs = Costs(ingredients)
    costs.look()
    links = measure_links(output / "links.json")
    say(f"costs in {time.monotonic() - begin:.0f} s; {links}")
    parts: dict[str, Callable[[], list[Row]]] = {
        "prediction": lambda: predict_and_run(ingredients, costs, links, output / "traces"),
        "engine": lambda: compare_engines(ingredients, output / "traces"),
        "padding": lambda: compare_padding(ingredients, costs.fitted(), links),
    }
    for name in given.parts:
        path = output / f"{name}.json"
        if both(path.exists()):
            continue
        begin = time.monotonic()
        rows: Any = parts[name]()
        if dist.get_rank() == 0:
            write_whole(path, json.dumps(rows))
        dist.barrier()
        say(f"{name} in {time.monotonic() - begin:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
