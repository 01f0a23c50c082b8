"""Predicted and measured steps of six plans, and the pipeline's engine beside torch's own; two processes, interleaved.

Finished parts are kept in the output folder and not repeated: an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from recipes.benchmarks.common.results import Row, make_result, rounded, save
from recipes.benchmarks.pipeline.settings import PARTS, PipelineSettings
from recipes.demo.processes import process_environment

ROOT = Path(__file__).resolve().parents[3]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.pipeline", description=__doc__)
    default = PipelineSettings
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=default.num_rounds, help="default: %(default)s")
    parser.add_argument("--engine-rounds", type=int, default=default.engine_rounds, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=default.num_batches, help="global batches; %(default)s")
    parser.add_argument("--vision-layers", type=int, default=default.vision_layers, help="default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=default.vocab_size, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, help="of a document; %(default)s")
    parser.add_argument("--output-dir", type=Path, default=Path("out/benchmarks/pipeline"), help="%(default)s")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="downloads (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the parts of an earlier invocation")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    given = parser.parse_args(arguments)
    if given.fresh:
        shutil.rmtree(given.output_dir, ignore_errors=True)
    settings = PipelineSettings(
        output_dir=given.output_dir.resolve(),
        cache=given.cache.resolve(),
        num_rounds=given.rounds,
        engine_rounds=given.engine_rounds,
        num_batches=given.batches,
        vision_layers=given.vision_layers,
        vocab_size=given.vocab_size,
        max_tokens=given.max_tokens,
    )
    _measure(settings, given.parts)
    if not given.no_save:
        print(f"[bench] {collect(settings)}")


def _measure(settings: PipelineSettings, parts: list[str]) -> None:
    from recipes.benchmarks.pipeline.ingredients import model_folder
    from recipes.demo.documents import load_documents
    from recipes.demo.model import build_model

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    path = settings.output_dir / "settings.json"
    if path.exists() and PipelineSettings.load(path) != settings:
        raise SystemExit(f"{settings.output_dir} holds parts of other settings; give --fresh or another --output-dir.")
    settings.save(path)
    load_documents(settings.cache)
    build_model(settings.cache, config=settings.model, name=model_folder(settings))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        "-m", "recipes.benchmarks.pipeline.run", "--settings", str(path), "--parts", *parts,
    ]  # fmt: skip
    begin = time.monotonic()
    finished = subprocess.run(command, cwd=ROOT, env=process_environment(), check=False)
    if finished.returncode != 0:
        raise SystemExit(f"it ended with status {finished.returncode}; run it again to go on from here.")
    print(f"[bench] pipeline: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)


def collect(settings: PipelineSettings) -> Path:
    """Reduce the finished parts to a dated result."""
    rows: list[Row] = []
    missing = []
    for name, what in PARTS.items():
        path = settings.output_dir / f"{name}.json"
        if path.exists():
            rows += [rounded(row) for row in json.loads(path.read_text(encoding="utf-8"))]
        else:
            missing.append(f"{what}: not measured")
    fields = {key: value for key, value in asdict(settings).items() if key not in ("output_dir", "cache")}
    fields |= {"model": asdict(settings.model)}
    command = f"python -m recipes.benchmarks.pipeline --rounds {settings.num_rounds}"
    return save(make_result("pipeline", rows, command=command, settings=fields, notes=missing))


if __name__ == "__main__":
    main()
