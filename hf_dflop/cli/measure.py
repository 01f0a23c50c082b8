"""`hf-dflop measure`: time a model's parts on this machine, print what they cost, write a model profile."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_dflop.errors import ModelError

if TYPE_CHECKING:
    from hf_dflop.cost import ModelProfile

__all__ = ["measure"]


class Module(StrEnum):
    """What can be frozen."""

    VISION = "vision"
    CONNECTOR = "connector"
    LLM = "llm"


class Recompute(StrEnum):
    """Whether layers are recomputed in the backward."""

    OFF = "off"
    ON = "on"
    BOTH = "both"


def measure(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Id on the Hub, a local folder, or a JSON file of a config. No weights."),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    device: Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`; the GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="`bfloat16` (default on a GPU), `float16`, `float32` (default on a CPU).")
    ] = None,
    attn_implementation: Annotated[
        str, typer.Option(help="`sdpa`, `eager`, `flash_attention_2`, as transformers names it.")
    ] = "sdpa",
    tp: Annotated[
        list[int] | None, typer.Option(min=1, help="Tensor-parallel degree; give it several times for several.")
    ] = None,
    frozen: Annotated[
        list[Module] | None, typer.Option(help="A module that is not trained; give it several times for several.")
    ] = None,
    activation_checkpointing: Annotated[
        Recompute, typer.Option(help="Recompute layers in the backward: off, on, or measure both.")
    ] = Recompute.OFF,
    max_tokens: Annotated[
        int | None, typer.Option(min=64, help="Largest LLM microbatch; 8192 on a GPU, 2048 on a CPU.")
    ] = None,
    max_patches: Annotated[int | None, typer.Option(min=64, help="Largest encoder microbatch.")] = None,
    max_points: Annotated[int, typer.Option(min=4, help="Sizes of each part at most.")] = 10,
    held_out: Annotated[int, typer.Option(min=0, help="Random sizes of each part that only check the result.")] = 6,
    budget_s: Annotated[float, typer.Option(min=0.1, help="Seconds for the sizes of one part.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the random sizes.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the model profile.")] = Path(
        "model_profile.json"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")
    ] = False,
) -> None:
    """Time encoder, connector, LLM and LM head of a model on this machine, forward and backward.

    Builds a few layers with random weights from the config; the whole model never has to fit. Adds sizes where the
    curve is known worst, then checks itself on random sizes at another depth and prints how far it is off. The
    profile feeds `CostModel.from_profile` and the planner.

    **Examples**

    `hf-dflop measure -m Qwen/Qwen2.5-VL-7B-Instruct --tp 1 --tp 2 -o qwen.json`

    `hf-dflop measure -m ./my_model --frozen vision --activation-checkpointing both --device cuda`
    """
    import transformers

    from hf_dflop.profile.measure import measure_model

    transformers.logging.set_verbosity_error()
    if output.is_dir():
        raise ModelError(f"--output {output} is a folder; name a file, such as {output / 'model_profile.json'}")
    if not output.absolute().parent.is_dir():
        raise ModelError(f"--output {output}: the folder {output.absolute().parent} is not there; make it first")
    found = measure_model(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        tp=tp or [1],
        frozen=[module.value for module in frozen or ()],
        activation_checkpointing={"off": False, "on": True, "both": "both"}[activation_checkpointing.value],  # type: ignore[arg-type]
        max_tokens=max_tokens,
        max_patches=max_patches,
        max_points=max_points,
        num_held_out=held_out,
        budget_s=budget_s,
        seed=seed,
        progress=False if as_json or not sys.stderr.isatty() else None,
    )
    found.save(output)
    if as_json:
        print(json.dumps({"output": str(output), "error": _error(found), **found.to_dict()}))
    else:
        _print(found, output)


def _error(found: "ModelProfile") -> dict[str, dict[str, float]]:
    """Held-out errors: of forward and backward together and apart, over all groups and of each."""
    import numpy as np

    from hf_dflop.cost.measurement import GROUPS

    told: dict[str, dict[str, float]] = {}
    for name, errors in (
        ("all", found.relative_errors()),
        ("forward", found.relative_errors("forward")),
        ("backward", found.relative_errors("backward")),
        *((group, found.relative_errors(group=group)) for group in GROUPS),
    ):
        if errors.size:
            told[name] = {
                "median": float(np.median(errors)),
                "p95": float(np.percentile(errors, 95)),
                "num_held_out": int(errors.size),
            }
    return told


def _print(found: "ModelProfile", output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(f"{found.model} in {found.dtype}, {found.attention} attention, on {found.device}", markup=False)
    table = Table(title="largest measured microbatch, seconds of one layer or part", title_justify="left")
    for heading in ("part", "setting", "tokens", "forward ms", "backward ms", "kept MiB"):
        table.add_column(heading, justify="left" if heading in ("part", "setting") else "right")
    for cells in _rows(found):
        table.add_row(*cells)
    console.print(table)
    for name, values in _error(found).items():
        told = f"median {values['median']:.1%}, 95th percentile {values['p95']:.1%}"
        console.print(f"held-out error, {name}: {told} of {values['num_held_out']} sizes", highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(f"model profile: {output}", markup=False, highlight=False)


def _rows(found: "ModelProfile") -> list[tuple[str, ...]]:
    from hf_dflop.cost.measurement import GROUP_OF_PART
    from hf_dflop.cost.parts import PARTS

    rows = []
    for part in PARTS:
        group = GROUP_OF_PART[part]
        settings = {
            (point.state, point.checkpointing, point.tp): point
            for point in sorted(found.measurements, key=lambda point: point.tokens)
            if point.group == group and not point.held_out
        }
        for (state, again, degree), largest in settings.items():
            size = [largest.tokens], [largest.pairs]
            seconds = [
                found.part_seconds(part, direction, *size, state=state, checkpointing=again, tp=degree)
                for direction in ("forward", "backward")
            ]
            memory = found.part_memory(part, state=state, checkpointing=again, tp=degree, dtype=found.dtype)
            if memory is None or seconds[0] is None or seconds[1] is None:
                continue
            kept = memory.kept_per_token_bytes * largest.tokens + memory.kept_per_pair_bytes * largest.pairs
            setting = ", ".join(
                [state, *(["checkpointed"] if again else []), *([f"tp={degree}"] if degree > 1 else [])]
            )
            cells = (f"{largest.tokens:,}", *(f"{one[0] * 1e3:,.2f}" for one in seconds if one is not None))
            rows.append((part.replace("_", " "), setting, *cells, f"{kept / 2**20:,.1f}"))
    return rows
