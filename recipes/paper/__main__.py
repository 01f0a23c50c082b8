"""`python -m recipes.paper`: plan and simulate the paper's settings, print them beside its claims; scaling curves.

Writes results.json, table.md, scaling.md and scaling.png into the output folder. A run that was stopped goes on where
it was: every (model, GPUs) that results.json has is kept.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from recipes.paper.report import draw_scaling, write_scaling_table, write_table
from recipes.paper.run import run_setting
from recipes.paper.settings import SCALING, SETTINGS

SCALING_GPUS = (8, 16, 64, 256, 1024)
SCALING_ARMS = ("homogeneous", "both", "anything", "fsdp")


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("out/paper"),
    scaling: Annotated[bool, typer.Option(help="Also the curves to 1,024 GPUs (several minutes).")] = True,
    only: Annotated[list[str] | None, typer.Option(help="Only these models; may be given again.")] = None,
    max_gpus: Annotated[int, typer.Option(help="Largest cluster of the curves.")] = SCALING_GPUS[-1],
) -> None:
    """Plan and simulate the settings of the DFLOP paper, beside what it claims. No GPU, no download."""
    names = [setting.name for setting in SCALING]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"unknown model {unknown[0]!r}; choose of {', '.join(names)}")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def keep(key: str, result: dict[str, Any]) -> None:
        results[key] = result
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(results, indent=1), encoding="utf-8")
        draft.rename(path)

    for setting in (s for s in SETTINGS if not only or s.name in only):
        key = f"{setting.name}@{setting.num_gpus}"
        if key not in results or "balancer only" not in results[key]["arms"]:
            keep(key, run_setting(setting, setting.num_gpus))
    print(write_table(results, output / "table.md"))
    if not scaling:
        return
    for num_gpus in (n for n in SCALING_GPUS if n <= max_gpus):
        for setting in (s for s in SCALING if not only or s.name in only):
            key = f"{setting.name}@{num_gpus}"
            if key not in results:
                keep(key, run_setting(setting, num_gpus, arms=SCALING_ARMS))
    print(write_scaling_table(results, output / "scaling.md"))
    draw_scaling(results, output / "scaling.png")
    print(f"written: {path}, {output / 'table.md'}, {output / 'scaling.png'}")


if __name__ == "__main__":
    typer.run(main)
