"""The record that a topic leaves behind: what was run, on what, and flat rows of numbers.

In: rows of one topic. Out: `<topic>/results/<date>.json`, and the newest of them again. Nothing on the benchmark
page comes from anywhere else.
"""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["BENCHMARKS", "Result", "hardware", "latest", "make_result", "rounded", "save", "versions"]

BENCHMARKS = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
_PACKAGES = ("hf_dflop", "torch", "transformers", "accelerate", "datasets", "numpy", "numba")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One invocation of a topic.

    Raises:
        ValueError: no rows, or a row without a field that others have.
    """

    topic: str
    date: str
    command: str
    hardware: str
    versions: dict[str, str]
    settings: dict[str, Any]
    """Sizes, seeds, repetitions: what one needs to repeat it."""
    rows: list[Row]
    """One measurement each; all rows of a kind have the same fields."""
    notes: list[str]
    """What was absent, and why."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"the result of {self.topic!r} has no rows; nothing was measured")
        kinds: dict[Any, set[str]] = {}
        for row in self.rows:
            fields = kinds.setdefault(row.get("kind"), set(row))
            if fields != set(row):
                raise ValueError(
                    f"{self.topic!r}: rows of kind {row.get('kind')!r} differ in their fields: "
                    f"{sorted(fields ^ set(row))}"
                )

    def of_kind(self, kind: str) -> list[Row]:
        """The rows whose field `kind` is this."""
        return [row for row in self.rows if row.get("kind") == kind]


def versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Installed versions, of Python and of the packages that a result depends on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *extra):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(gpu: str = "no GPU used") -> str:
    """The machine in words, with the GPU that was used."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {_cpu_model()}), {gpu}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "model unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "model unknown")


def make_result(
    topic: str,
    rows: list[Row],
    *,
    command: str,
    settings: dict[str, Any],
    notes: Sequence[str] = (),
    packages: Sequence[str] = (),
    gpu: str = "no GPU used",
) -> Result:
    """A result of today on this machine; `gpu` names the GPU, if one was used."""
    return Result(
        topic=topic,
        date=datetime.date.today().isoformat(),
        command=command,
        hardware=hardware(gpu),
        versions=versions(packages),
        settings=settings,
        rows=rows,
        notes=list(notes),
    )


def save(result: Result, folder: Path | None = None) -> Path:
    """Write a result as `<topic>/results/<date>.json`, one row a line; whole, or not at all."""
    folder = folder or BENCHMARKS / result.topic / "results"
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"schema_version": SCHEMA_VERSION, **asdict(result)}
    rows = fields.pop("rows")
    head = json.dumps(fields, indent=1)[:-2]
    body = ",\n  ".join(json.dumps(row) for row in rows)
    path = folder / f"{result.date}.json"
    draft = path.with_suffix(".part")
    draft.write_text(f'{head},\n "rows": [\n  {body}\n ]\n}}\n', encoding="utf-8")
    draft.rename(path)
    return path


def load(path: Path) -> Result:
    """Read what `save` wrote.

    Raises:
        ValueError: written by another version of this module.
    """
    fields = json.loads(path.read_text(encoding="utf-8"))
    found = fields.pop("schema_version", None)
    if found != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {found!r}; {SCHEMA_VERSION} is read here. Run the topic again.")
    return Result(**fields)


def latest(topic: str, benchmarks: Path = BENCHMARKS) -> Result | None:
    """The newest result of a topic, or None where it has not been run."""
    paths = sorted((benchmarks / topic / "results").glob("*.json"))
    return load(paths[-1]) if paths else None


def rounded(value: Any) -> Any:
    """Six significant digits: enough for any table, and a result that a person can read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return value
