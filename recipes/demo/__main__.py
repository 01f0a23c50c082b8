"""`make demo`: fetch real documents and weights, train under each sampler in turn, and show what waiting cost.

Every stage keeps its result in the output folder and is skipped when that is there, so an interrupted demo goes on
where it stopped. Remove the output folder to run it all again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipes.demo import DemoAssets, prepare
from recipes.demo.processes import process_environment
from recipes.demo.settings import ARMS, DemoSettings, write_whole

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("out/demo"), help="results (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="downloads (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: about 7 minutes of them)")
    parser.add_argument("--rounds", type=int, default=DemoSettings.num_rounds, help="interleaved rounds")
    arguments = parser.parse_args()
    start = time.monotonic()
    settings = DemoSettings(
        output_dir=arguments.output_dir.resolve(),
        cache=arguments.cache.resolve(),
        num_steps=arguments.steps,
        num_rounds=arguments.rounds,
    )
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    _keep_settings(settings)

    say("real documents and weights: fetching what is not there yet")
    assets = prepare(settings.cache)
    say(f"documents: {assets.source}")
    facts = _annotation(settings, assets)
    say(
        f"counted {facts['rows']} samples without decoding pixels: {facts['annotate_ms_per_sample']:.2f} ms each, "
        f"{facts['annotate_speedup']:.0f} times faster than processing them, same counts: "
        f"{facts['annotate_same_counts']}"
    )
    say(f"training on {settings.num_ranks} processes; {settings.num_rounds} rounds of {len(ARMS)} runs, some minutes")
    _train(settings)
    _report(settings, assets, facts)
    say(f"done in {(time.monotonic() - start) / 60:.1f} minutes")


def say(message: str) -> None:
    print(f"[demo] {message}", flush=True)


def _keep_settings(settings: DemoSettings) -> None:
    """Results of other settings would not fit together: refuse instead of mixing them."""
    path = settings.output_dir / "settings.json"
    if path.exists():
        kept = DemoSettings.load(path)
        if kept != settings:
            raise SystemExit(
                f"{settings.output_dir} holds results of other settings ({kept}). Give another --output-dir, or "
                "remove it."
            )
    settings.save(path)


def _annotation(settings: DemoSettings, assets: DemoAssets) -> dict[str, Any]:
    path = settings.output_dir / "annotation.json"
    if not path.exists():
        import datasets
        from transformers import AutoConfig, AutoProcessor

        from recipes.demo.annotation import measure_annotation

        say("counting tokens and patches of the documents, against really processing them")
        facts = measure_annotation(
            datasets.load_from_disk(str(assets.dataset_path))["train"],
            AutoProcessor.from_pretrained(assets.model_path),
            AutoConfig.from_pretrained(assets.model_path),
        )
        write_whole(path, json.dumps(facts))
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _train(settings: DemoSettings) -> None:
    runs = settings.output_dir / "runs"
    if all((runs / f"{arm}-{round_}.json").exists() for arm in ARMS for round_ in range(settings.num_rounds)):
        return
    # With --multi_gpu accelerate really starts several processes, also on CPU; --cpu alone would start one.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", str(settings.num_ranks), "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_ip", "127.0.0.1", "--main_process_port", "0",
        "-m", "recipes.demo.compare", "--settings", str(settings.output_dir / "settings.json"),
    ]  # fmt: skip
    finished = subprocess.run(command, cwd=ROOT, env=process_environment(), check=False)
    if finished.returncode != 0:
        raise SystemExit(f"training ended with status {finished.returncode}; run the demo again to go on from here.")


def _report(settings: DemoSettings, assets: DemoAssets, facts: dict[str, Any]) -> None:
    import datasets
    from rich.console import Console
    from transformers import AutoConfig, AutoProcessor

    import hf_dflop
    from hf_dflop.cost import CostModel
    from recipes.demo.more_ranks import simulate
    from recipes.demo.report import print_table, write_report

    annotated, _ = hf_dflop.profile_dataset(
        datasets.load_from_disk(str(assets.dataset_path))["train"],
        AutoProcessor.from_pretrained(assets.model_path),
        config=AutoConfig.from_pretrained(assets.model_path),
    )
    shapes = hf_dflop.Shapes.of_dataset(annotated)
    facts = facts | {
        "source": assets.source,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread a process",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")),
    }
    more = simulate(shapes, CostModel.load(settings.output_dir / "cost_model.json"), settings)
    facts["more_ranks"] = more
    trained = shapes.select(range(settings.paced().num_samples))
    path, summaries = write_report(settings.output_dir, shapes, trained, facts)
    print_table(summaries, Console(width=max(Console().width, 126)))
    if more:
        say(
            f"simulated for 8 ranks, samples/s ÷ stock: hf_dflop {more['balanced']:.2f}, packed {more['packed']:.2f}, "
            f"batch_rebalance {more['batch_rebalance']:.2f}, group_by_length {more['group_by_length']:.2f}"
        )
    say(f"the same in pictures: {path}")


if __name__ == "__main__":
    main()
