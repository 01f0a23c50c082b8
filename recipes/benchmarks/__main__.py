"""Run benchmarks, check their ratios, or make the page from stored results."""

import argparse
import time
from importlib import import_module

RUNNABLE = ("balancing", "partition", "lengths", "scale", "planner", "pipeline", "gpu")
_KEEPING = ("balancing", "pipeline", "gpu")
"""Topics that go on with what an earlier run left, unless told not to."""


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("page", help="docs/benchmarks.md and its figures from the newest stored results")
    run = commands.add_parser("run", help="measure topics in turn, then make the page")
    run.add_argument("topics", nargs="*", metavar="TOPIC", help=f"default: {' '.join(RUNNABLE)}")
    commands.add_parser("smoke", help="small versions of the topics; fails where a ratio leaves its stored bound")
    given = parser.parse_args()
    if given.command == "smoke":
        from recipes.benchmarks.smoke import main as smoke

        smoke()
        return
    if given.command == "run":
        unknown = set(given.topics) - set(RUNNABLE)
        if unknown:
            parser.error(f"unknown topic {', '.join(sorted(unknown))}; choose from {', '.join(RUNNABLE)}")
        for topic in given.topics or RUNNABLE:
            if topic == "gpu" and not _has_gpu():
                print("[bench] gpu: left out, torch sees no CUDA device here", flush=True)
                continue
            begin = time.monotonic()
            import_module(f"recipes.benchmarks.{topic}.__main__").main(["--fresh"] if topic in _KEEPING else [])
            print(f"[bench] {topic}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    from recipes.benchmarks.common.page import write_page

    for path in write_page():
        print(f"[bench] {path}")


if __name__ == "__main__":
    main()
