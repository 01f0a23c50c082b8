"""The benchmark page, `docs/benchmarks.md` with its figures, and the table in the README, from the newest results.

No number on the page comes from anywhere but the JSON. Topics that were not run are named as such.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.benchmarks.common.figures import Figure, draw
from recipes.benchmarks.common.results import BENCHMARKS, Result, latest

__all__ = ["DOCS", "README", "TOPICS", "page_figures", "page_text", "readme_text", "stored_results", "write_page"]

README = Path(__file__).resolve().parents[3] / "README.md"
DOCS = README.parent / "docs"
_BEGIN, _END = "<!-- from the benchmarks: begin -->", "<!-- end -->"

TOPICS: dict[str, str] = {
    "balancing": "Balancing in training: do ranks finish together, and what is it worth?",
    "partition": "Partition: how near to the best, and how fast?",
    "lengths": "Annotation: what does it take to know every sample's cost?",
    "scale": "Scale: from 8 to 4,096 ranks, simulated",
    "planner": "Planner: how long does a planning take?",
    "pipeline": "Pipeline: predicted and real steps; against torch's 1F1B, padding to the longest, DDP and FSDP2",
    "prediction": "Prediction: predicted against measured",
    "gpu": "One GPU: module curves, microbatch times replayed rank by rank",
}
"""Topics in the order of the page."""

_HEAD = """# Benchmarks

hf_dflop beside what one would use instead. Every table and figure here is made from the JSON in
`recipes/benchmarks/*/results/` by

```bash
python -m recipes.benchmarks page   # this page again, from the stored results
make bench                          # measure everything again (about half an hour on two cores), then this page
make bench-smoke                    # two minutes: ratios against stored bounds
```

A test compares the page with the JSON. Where another is ahead of ours, the page says so. CPU processes show the
mechanism, not what a GPU cluster will gain.
"""


def _report(topic: str) -> Any:
    return import_module(f"recipes.benchmarks.{topic}.report")


def page_text(results: dict[str, Result | None]) -> str:
    """The page in markdown."""
    parts = [_HEAD]
    for topic, title in TOPICS.items():
        parts.append(f"## {title}\n")
        result = results.get(topic)
        readme = f"[How it is measured](../recipes/benchmarks/{topic}/README.md)"
        if result is None:
            parts.append(f"Not run yet. {readme}.\n")
            continue
        report = _report(topic)
        for figure in report.figures(result):
            parts.append(f"![{figure.alt}](benchmarks/{figure.name}.svg)\n")
        parts.append(f"{report.section(result)}\n")
        remarks = BENCHMARKS / topic / "remarks.md"
        if remarks.exists():
            parts.append(remarks.read_text(encoding="utf-8").strip() + "\n")
        parts += [f"- {note}." for note in dict.fromkeys(result.notes)]
        if result.notes:
            parts.append("")
        packages = ", ".join(f"{name} {number}" for name, number in result.versions.items())
        settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
        parts.append(
            f"<details><summary>{result.date}, {result.hardware}</summary>\n\n`{result.command}`. {packages}. "
            f"Settings: {settings}.\n</details>\n\n{readme}.\n"
        )
    return "\n".join(parts)


def readme_text(readme: str, results: dict[str, Result | None]) -> str:
    """The README with its table of benchmarks made anew, between two comments.

    Raises:
        ValueError: the comments are not there.
    """
    if not 0 <= readme.find(_BEGIN) < readme.find(_END):
        raise ValueError(f"the README must have the lines {_BEGIN!r} and {_END!r}; its table goes between them")
    before, _, rest = readme.partition(_BEGIN)
    result = results["balancing"]
    if result is None:
        return readme
    said = f"Median (smallest–largest) of {result.settings['num_rounds']} rounds; {result.date}, {result.hardware}."
    made = f"{_BEGIN}\n\n{_report('balancing').summary(result)}\n\n{said}\n\n{_END}"
    return before + made + rest.partition(_END)[2]


def page_figures(results: dict[str, Result | None]) -> list[Figure]:
    """All figures of the page."""
    return [figure for topic in TOPICS if (result := results.get(topic)) for figure in _report(topic).figures(result)]


def stored_results() -> dict[str, Result | None]:
    """The newest result of every topic; predictions are read from what balancing stored."""
    results = {topic: latest(topic) for topic in TOPICS}
    return results | {"prediction": results["balancing"]}


def write_page(docs: Path = DOCS, readme: Path = README) -> list[Path]:
    """Write the page, its figures and its part of the README; returns the files."""
    results = stored_results()
    folder = docs / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    written = [draw(figure, folder) for figure in page_figures(results)]
    page = docs / "benchmarks.md"
    page.write_text(page_text(results), encoding="utf-8")
    readme.write_text(readme_text(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    return [page, readme, *written]
