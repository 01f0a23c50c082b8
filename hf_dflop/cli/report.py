"""`hf-dflop report`: who waited for whom in a recorded run, as text, JSON or one HTML page."""

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_dflop.errors import DatasetError

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="Folder of the trace: the one that was `DflopCallback(trace_dir=...)`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write one self-contained HTML page to this file.")
    ] = None,
    skip_steps: Annotated[int, typer.Option(min=0, help="Steps left out at the start: warm-up.")] = 1,
    microbatches: Annotated[int, typer.Option(min=0, help="How many underestimated microbatches to name.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")
    ] = False,
) -> None:
    """Tell which rank the others waited for, and why: slow itself, more work, data, network, or wrong costs.

    Reads what `DflopCallback(trace_dir="trace")` recorded, also while the run goes on, and after one that was cut off:
    what is missing is said, and the rest is reported.

    **Examples**

    `hf-dflop report trace`

    `hf-dflop report trace -o report.html`

    `hf-dflop report trace --json | jq .verdict`
    """
    from hf_dflop.integrations.report import report_of
    from hf_dflop.integrations.trace import load_trace

    if output is not None and output.is_dir():
        raise DatasetError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}")
    try:
        trace = load_trace(run)
    except (FileNotFoundError, PermissionError) as error:
        raise DatasetError(str(error)) from error
    found = report_of(trace, skip_steps=skip_steps, num_microbatches=microbatches)
    if output is not None:
        from hf_dflop.integrations.report_page import render_report

        try:
            page = render_report(trace, found)
        except ModuleNotFoundError as error:
            raise DatasetError(f"the page needs {error.name}: pip install 'hf_dflop[plots]'") from error
        _write(page, output)
    if as_json:
        print(json.dumps(_without_nan(found.to_json())))
        return
    print("\n".join(found.verdict()))
    print()
    print(found.summary())
    if output is not None:
        print(f"\nreport: {output}")


def _write(page: str, output: Path) -> None:
    """All of the page or nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=output.parent, suffix=".html", delete=False, encoding="utf-8") as file:
        file.write(page)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(output)


def _without_nan(value: Any) -> Any:
    """NaN is not JSON: what was not measured is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
