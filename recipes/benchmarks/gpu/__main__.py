"""Module curves, the samplers' microbatches rank by rank, and the engine with two stages, on one CUDA device.

Nothing is downloaded and no dataset is read: models are built from configs, samples from the shapes of a mix. Finished
parts (and finished arms of the replay) are kept in the output folder and not repeated, so that an interrupted run goes
on where it stopped; about eight minutes on an H100 in all.

A result is saved when the model's real widths ran on a GPU. --device cpu --tiny shows in a minute that the code runs.
"""

import argparse
import json
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hf_dflop.data.by_sample import BY_SAMPLE
from recipes.benchmarks.balancing.settings import ARMS
from recipes.benchmarks.common.results import Result, Row, make_result, save
from recipes.benchmarks.gpu.settings import MIX_NAMES, PARTS, GpuSettings, tiny
from recipes.demo.settings import write_whole

_NOT_TOLD = ("device", "device_name", "is_tiny")
"""Settings that the page has elsewhere."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:8} {said}" for name, said in PARTS.items()),
    )
    standard = GpuSettings()
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--mixes", nargs="*", choices=MIX_NAMES, default=list(MIX_NAMES), help="default: both")
    parser.add_argument("--rounds", type=int, default=None, help=f"of the replay ({standard.num_rounds})")
    parser.add_argument("--steps", type=int, default=None, help=f"of a round ({standard.num_steps})")
    parser.add_argument("--ranks", type=int, default=None, help=f"that are replayed ({standard.num_ranks})")
    parser.add_argument("--vision-layers", type=int, default=None, help=f"depth ({standard.vision_layers})")
    parser.add_argument("--llm-layers", type=int, default=None, help=f"depth ({standard.llm_layers})")
    parser.add_argument("--vocab-size", type=int, default=None, help=f"keep it with the depth ({standard.vocab_size})")
    parser.add_argument(
        "--attention",
        choices=[BY_SAMPLE, "sdpa"],
        default=standard.attention,
        help="sdpa_by_sample (default) attends sample by sample, as varlen kernels do; sdpa is the stock one, which "
        "computes all pairs of a packed row",
    )
    parser.add_argument("--device", default=None, help="the CUDA device, if there is one; cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="narrow modules and few steps; no result is saved")
    parser.add_argument("--output-dir", type=Path, default=Path("out/benchmarks/gpu"), help="%(default)s")
    parser.add_argument("--fresh", action="store_true", help="forget the parts of an earlier invocation")
    parser.add_argument("--no-save", action="store_true", help="do not write the result into the repository")
    given = parser.parse_args(arguments)
    device = given.device or _cuda()
    if device is None:
        raise SystemExit(
            "[bench] gpu: torch sees no CUDA device, nothing was measured. Give --device cpu --tiny to try the code."
        )
    if not device.startswith("cuda") and not given.tiny:
        parser.error(f"--device {device} goes with --tiny alone: seconds of these widths are a GPU's.")
    settings = _settings(given, device)
    folder = given.output_dir.resolve()
    if given.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "settings.json"
    if kept.exists() and GpuSettings.load(kept) != settings:
        raise SystemExit(f"{folder} holds parts of other settings or another card; give --fresh or --output-dir.")
    settings.save(kept)
    measure(settings, folder, given.parts, given.mixes)
    result = collect(settings, folder)
    if given.no_save or settings.is_tiny:
        print(f"[bench] gpu: {len(result.rows)} rows, not saved as a result")
    else:
        print(f"[bench] gpu: {save(result)}")


def _cuda() -> str | None:
    import torch

    return "cuda" if torch.cuda.is_available() else None


def _settings(given: argparse.Namespace, device: str) -> GpuSettings:
    """The standard sizes, the tiny ones on demand, and what was asked for on top."""
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(torch.device(device).index or 0)
        found = torch.cuda.get_device_properties(torch.device(device))
        name = f"one {found.name} ({found.total_memory / 2**30:.0f} GiB)"
    settings = replace(
        GpuSettings(),
        device=device,
        device_name=name if on_gpu else "no GPU used",
        dtype="bfloat16" if on_gpu else "float32",
        attention=given.attention,
    )
    if given.tiny:
        settings = tiny(settings)
    asked = {
        "num_rounds": given.rounds,
        "num_steps": given.steps,
        "num_ranks": given.ranks,
        "vision_layers": given.vision_layers,
        "llm_layers": given.llm_layers,
        "vocab_size": given.vocab_size,
    }
    return replace(settings, **{name: value for name, value in asked.items() if value is not None})


def measure(settings: GpuSettings, folder: Path, parts: list[str], mixes: list[str]) -> None:
    """Run what is not there yet; the replay needs the curves, and has them measured."""
    from hf_dflop.cost import CostModel
    from hf_dflop.errors import ModelError
    from recipes.benchmarks.gpu.curves import measure_curves
    from recipes.benchmarks.gpu.engine import compare_engines
    from recipes.benchmarks.gpu.model import build_model
    from recipes.benchmarks.gpu.replay import replay

    absent: dict[str, str] = _read(folder / "absent.json", {})
    if "curves" in parts or "replay" in parts:
        begin = time.monotonic()
        profile = measure_curves(settings, folder / "profile.json")
        print(f"[bench] gpu: curves in {time.monotonic() - begin:.0f} s; held-out error {profile.error}", flush=True)
    model = build_model(settings) if {"replay", "engine"} & set(parts) else None
    if "replay" in parts:
        begin = time.monotonic()
        absent |= replay(settings, model, CostModel.from_profile(profile), mixes, folder / "replay.json")
        print(f"[bench] gpu: replay in {time.monotonic() - begin:.0f} s", flush=True)
    path = folder / "engine.json"
    if "engine" in parts and not path.exists():
        begin = time.monotonic()
        try:
            write_whole(path, json.dumps(compare_engines(settings, model)))
            absent.pop("engine", None)
        except ModelError as error:  # the models of an older transformers cannot be entered behind their encoder
            absent["engine"] = str(error)
        print(f"[bench] gpu: engine in {time.monotonic() - begin:.0f} s", flush=True)
    for what, why in absent.items():
        print(f"[bench] gpu: {what} is left out: {why}", flush=True)
    write_whole(folder / "absent.json", json.dumps(absent))


def collect(settings: GpuSettings, folder: Path) -> Result:
    """The finished parts in `folder`; a round of the replay counts when all its arms are there."""
    from hf_dflop.cost import ModelProfile
    from recipes.benchmarks.gpu.curves import module_rows

    rows: list[Row] = []
    if (folder / "profile.json").exists():
        rows += module_rows(ModelProfile.load(folder / "profile.json"))
    absent: dict[str, str] = _read(folder / "absent.json", {})
    runs: list[Row] = _read(folder / "replay.json", [])
    wanted = {arm.name for arm in ARMS if arm.sampler not in absent}
    for run in runs:
        beside = {other["arm"] for other in runs if (other["mix"], other["round"]) == (run["mix"], run["round"])}
        if wanted <= beside:
            rows.append(run)
    rows += _read(folder / "engine.json", [])
    told = {entry.name: getattr(settings, entry.name) for entry in fields(settings) if entry.name not in _NOT_TOLD}
    return make_result(
        "gpu",
        rows,
        command="python -m recipes.benchmarks.gpu",
        settings=told,
        notes=[f"{what} is left out: {why.rstrip('.')}" for what, why in absent.items()],
        gpu=settings.device_name,
    )


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise


if __name__ == "__main__":
    main()
