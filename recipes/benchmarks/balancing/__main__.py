"""Train under every sampler, padded and packed, on three data mixes; two processes, interleaved.

Finished runs are kept in the output folder and not repeated: an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from hf_dflop.data.by_sample import BY_SAMPLE
from recipes.benchmarks.balancing.clocks import median_clocks, seconds_and_waiting
from recipes.benchmarks.balancing.model import SIZES
from recipes.benchmarks.balancing.settings import ARMS, MAX_TILES, MIXES, BalancingSettings
from recipes.benchmarks.common.results import Row, make_result, rounded, save
from recipes.demo.processes import process_environment

ROOT = Path(__file__).resolve().parents[3]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.balancing", description=__doc__)
    parser.add_argument("--mixes", nargs="*", choices=list(MIXES), default=list(MIXES), help="default: all three")
    parser.add_argument("--rounds", type=int, default=BalancingSettings.num_rounds, help="default: %(default)s")
    parser.add_argument(
        "--repeats", type=int, default=BalancingSettings.num_repeats, help="runs of an arm in a round; %(default)s"
    )
    parser.add_argument("--steps", type=int, default=BalancingSettings.num_steps, help="of a run; %(default)s")
    parser.add_argument("--arms", nargs="*", choices=[arm.name for arm in ARMS], default=None, help="default: all")
    parser.add_argument("--output-dir", type=Path, default=Path("out/benchmarks/balancing"), help="%(default)s")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="downloads (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of an earlier invocation")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    given = parser.parse_args(arguments)
    if given.fresh:
        shutil.rmtree(given.output_dir, ignore_errors=True)
    for mix in given.mixes:
        settings = BalancingSettings(
            output_dir=given.output_dir.resolve() / mix,
            cache=given.cache.resolve(),
            mix=mix,
            num_rounds=given.rounds,
            num_repeats=given.repeats,
            num_steps=given.steps,
        )
        _train(settings, given.arms)
    if not given.no_save:
        print(f"[bench] {collect(given.output_dir)}")


def _train(settings: BalancingSettings, arms: list[str] | None) -> None:
    from recipes.demo import prepare

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    path = settings.output_dir / "settings.json"
    if path.exists() and BalancingSettings.load(path) != settings:
        raise SystemExit(f"{settings.output_dir} holds runs of other settings; give --fresh or another --output-dir.")
    settings.save(path)
    prepare(settings.cache)
    # With --multi_gpu accelerate really starts several processes, also on CPU; --cpu alone would start one.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", str(settings.num_ranks), "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_ip", "127.0.0.1", "--main_process_port", "0",
        "-m", "recipes.benchmarks.balancing.train", "--settings", str(path),
        *(["--arms", *arms] if arms else []),
    ]  # fmt: skip
    begin = time.monotonic()
    finished = subprocess.run(command, cwd=ROOT, env=process_environment(), check=False)
    if finished.returncode != 0:
        raise SystemExit(f"training ended with status {finished.returncode}; run it again to go on from here.")
    print(f"[bench] {settings.mix}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)


def collect(folder: Path) -> Path:
    """Reduce the finished runs of every mix in `folder` to a dated result."""
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    for mix in MIXES:
        if not (folder / mix / "settings.json").exists():
            continue
        kept = json.loads((folder / mix / "settings.json").read_text(encoding="utf-8"))
        settings |= {key: value for key, value in kept.items() if key not in ("output_dir", "cache", "mix")}
        runs = [
            json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / mix / "runs").glob("*.json"))
        ]
        for round_ in range(kept["num_rounds"]):
            own = [run for run in runs if run["round"] == round_]
            by_arm = {arm.name: [run for run in own if run["arm"] == arm.name] for arm in ARMS}
            if any(len(repetitions) < kept["num_repeats"] for repetitions in by_arm.values()):
                continue  # it was interrupted
            for arm, repetitions in by_arm.items():
                row, slots = _merged(repetitions)
                rows.append({"kind": "run", "mix": mix, **rounded(row)})
                if row["sampler"] in ("stock", "hf_dflop") and round_ == 0:
                    rows.append({"kind": "slots", "mix": mix, "arm": arm, "predicted_measured_s": rounded(slots)})
    if not rows:
        raise SystemExit(f"no finished run in {folder}")
    settings |= {"model": SIZES, "attention": BY_SAMPLE, "max_tiles": MAX_TILES}
    command = (
        f"python -m recipes.benchmarks.balancing --rounds {settings['num_rounds']} "
        f"--repeats {settings['num_repeats']} --steps {settings['num_steps']}"
    )
    return save(make_result("balancing", rows, command=command, settings=settings))


def _merged(repetitions: list[Row]) -> tuple[Row, list[list[float]]]:
    """One row of the repetitions of a run, and (predicted, measured) seconds of its microbatches."""
    row = {key: value for key, value in repetitions[0].items() if key not in ("repeat", "clocks", "predicted_s")}
    clocks = median_clocks([run["clocks"] for run in repetitions])
    row["seconds"], row["waiting"] = seconds_and_waiting(clocks)
    row["busy_s"] = [sum(sum(step["slots"]) for step in steps) for steps in clocks]
    row["data_s"] = [sum(step["data"] for step in steps) for steps in clocks]
    for key in ("wall_s", "waiting_by_wall_clock"):
        row[key] = median(run[key] for run in repetitions)
    row["held_out_loss"] = next((r["held_out_loss"] for r in repetitions if r["held_out_loss"] is not None), None)
    slots = [
        [predicted, measured]
        for steps, own in zip(repetitions[0]["predicted_s"], clocks, strict=True)
        for step, clock in zip(steps, own, strict=True)
        for predicted, measured in zip(step, clock["slots"], strict=False)
    ]
    return row, slots


if __name__ == "__main__":
    main()
