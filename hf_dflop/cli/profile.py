"""`hf-dflop profile`: annotate a dataset for a model, print a summary, write the report. `merge`: join its parts."""

import json
import os
import shutil
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_dflop.errors import DatasetError

if TYPE_CHECKING:
    from hf_dflop.profile import DatasetProfile

__all__ = ["merge", "profile"]


class OnError(StrEnum):
    """What becomes of rows that are not usable."""

    RAISE = "raise"
    SKIP = "skip"
    MARK = "mark"


class Sample(StrEnum):
    """Which rows are looked at."""

    FIRST = "first"
    RANDOM = "random"


class Labels(StrEnum):
    """What is learned."""

    ASSISTANT = "assistant"
    ALL = "all"


def profile(
    dataset: Annotated[
        str, typer.Argument(help="Id of a dataset on the Hub, or a local folder or file (parquet, json, images).")
    ],
    processor: Annotated[
        str,
        typer.Option("--processor", "-p", help="Model whose processor counts: an id on the Hub or a local folder."),
    ],
    name: Annotated[str | None, typer.Option(help="Configuration of the dataset, such as `ai2d`.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to profile; without it, every split.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the dataset.")] = None,
    labels: Annotated[
        Labels, typer.Option(help="What is learned: the assistant's turns, or all text.")
    ] = Labels.ASSISTANT,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut samples to this many tokens.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images, if it is not recognised.")] = None,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Worker processes.")] = None,
    on_error: Annotated[
        OnError, typer.Option(help="Rows that are not usable: stop, drop them, or keep them marked. All are listed.")
    ] = OnError.RAISE,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Look at this many rows only.")] = None,
    sample: Annotated[Sample, typer.Option(help="Which rows `--max-samples` takes.")] = Sample.FIRST,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read rows from the Hub as needed (1,000 by default), no download.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only part I of N of the rows, from 0; `hf-dflop merge` joins.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for profile.json, figures and report.html.")
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=2, help="GPUs for which the report predicts waiting, again for each number. [2, 8, 64]"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")
    ] = False,
) -> None:
    """Count what each sample of a dataset costs a vision-language model, without decoding a pixel.

    Prints totals and quantiles of images, patches and tokens. With `--output`, also writes a page that shows which
    samples are dear, and how long GPUs would wait for each other.

    **Examples**

    `hf-dflop profile HuggingFaceM4/the_cauldron --name ai2d -p HuggingFaceTB/SmolVLM-256M-Instruct -o out`

    `torchrun --nproc-per-node 8 -m hf_dflop.cli profile ./rows -p HuggingFaceTB/SmolVLM-256M-Instruct -o out`
    counts a part in each process (under `accelerate launch`, too); `hf-dflop merge out/part-* -o out` joins them.

    `hf-dflop profile ./my_photos -p Qwen/Qwen2.5-VL-3B-Instruct --on-error skip --json > profile.json`
    """
    _quiet(as_json)
    from hf_dflop.profile import profile_dataset

    if output is not None and output.is_file():
        raise DatasetError(f"--output {output} is a file; name a folder")
    if shard is not None and max_samples is not None:
        raise DatasetError("--shard and --max-samples do not go together; pass one of them")
    counted = _shard(shard) or _rank()
    if counted is not None and (streaming or max_samples is not None):
        raise DatasetError("a dataset is counted in parts as a whole; leave out --streaming and --max-samples")
    if shard is None and counted is not None and output is not None:
        output = output / f"part-{counted[0]:05}-of-{counted[1]:05}"
    annotated, found = profile_dataset(
        dataset,
        processor,
        name=name,
        split=split,
        revision=revision,
        labels=labels.value,
        max_length=max_length,
        image_column=image_column,
        num_proc=num_proc,
        on_error=on_error.value,
        max_samples=max_samples,
        sample=sample.value,
        streaming=streaming,
        shard=counted,
    )
    parts = (
        {key: (annotated[key], found[key]) for key in found} if isinstance(found, dict) else {"": (annotated, found)}
    )
    if output is not None:
        _save(parts, output, ranks)
    if as_json:
        described = {key: _describe(part) for key, (_, part) in parts.items()}
        print(json.dumps(described.get("", {"splits": described})))
        return
    for key, (_, part) in parts.items():
        _print(part, key)
    if output is not None:
        from rich.console import Console

        for key in parts:
            page = output / key / "report.html"
            told = f"report: {page}" if page.exists() else "no report.html: pip install 'hf_dflop[plots]'"
            Console(soft_wrap=True).print(told, markup=False, highlight=False)


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders that `hf-dflop profile --shard I/N -o ...` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the profile of the whole dataset.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")
    ] = False,
) -> None:
    """Join the profiles of all parts of a dataset into the profile of the whole, exactly."""
    from hf_dflop.profile import DatasetProfile

    whole = DatasetProfile.merge(DatasetProfile.load(part) for part in parts)
    _save({"": (None, whole)}, output)
    if as_json:
        print(json.dumps(_describe(whole)))
    else:
        _print(whole, "")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, num_parts = text.partition("/")
    if not (part.isdigit() and num_parts.isdigit() and int(part) < int(num_parts)):
        raise DatasetError(f"--shard {text} is not I/N with 0 <= I < N, such as 0/4")
    return int(part), int(num_parts)


def _rank() -> tuple[int, int] | None:
    """This process and the number of all, where torchrun or accelerate launched several."""
    rank, num_ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdigit() and num_ranks.isdigit() and int(num_ranks) > 1):
        return None
    return int(rank), int(num_ranks)


def _quiet(as_json: bool) -> None:
    """Progress bars only where someone watches."""
    import datasets
    import transformers

    if as_json or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


def _save(parts: dict[str, tuple[Any, "DatasetProfile"]], output: Path, ranks: list[int] | None = None) -> None:
    """Write everything beside the folder first, so that a failure leaves nothing half-written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as unfinished:
        for key, (data, part) in parts.items():
            part.save(Path(unfinished) / key, dataset=data, ranks=ranks or None)
        shutil.copytree(unfinished, output, dirs_exist_ok=True)


def _describe(part: "DatasetProfile") -> dict[str, Any]:
    return {
        "num_samples": part.num_samples,
        "totals": part.totals,
        "quantiles": part.quantiles,
        "errors": [{"index": error.index, "reason": error.reason} for error in part.errors],
        "provenance": part.provenance,
    }


def _print(part: "DatasetProfile", split: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{split}: {part.num_samples:,} samples" if split else f"{part.num_samples:,} samples"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("per sample", "total", "median", "95 %", "largest"):
        table.add_column(heading, justify="left" if heading == "per sample" else "right")
    for name, values in part.shown.items():
        if not name.endswith("_sq"):
            cells = (f"{part.totals[name]:,}", *(f"{values[q]:,.0f}" for q in ("0.5", "0.95", "1.0")))
            table.add_row(name.replace("num_", "").replace("_", " "), *cells)
    console.print(table)
    for error in part.errors[:5]:
        console.print(f"not usable: {error.reason}", style="red", markup=False, highlight=False)
    if len(part.errors) > 5:
        console.print(f"... and {len(part.errors) - 5:,} more rows that are not usable", style="red")
