"""The demo's last word: a table in the terminal, and one self-contained HTML page."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.table import Table

from hf_dflop.cost import CostModel
from hf_dflop.shapes import Shapes
from recipes.demo import figures
from recipes.demo.results import ArmSummary, Runs, load_runs, percent, spread, summarize
from recipes.demo.settings import OWN_ARMS

__all__ = ["print_table", "write_report"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def print_table(summaries: list[ArmSummary], console: Console | None = None) -> None:
    """The comparison as a table in the terminal."""
    table = Table(
        title="Two ranks, the same samples, runs interleaved; median (min–max) over rounds",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("sampler", "samples/s", "÷ stock", "packed ÷ this", "waiting", "wall ÷ compute", "padding", "GiB"):
        table.add_column(name, justify="left" if name == "sampler" else "right", no_wrap=True)
    for summary in summaries:
        table.add_row(
            figures.NAMES.get(summary.arm, summary.arm),
            spread(summary.samples_per_s),
            summary.spread,
            spread(summary.ratio_of_packed),
            percent(summary.idle_fraction),
            f"{median(summary.wall_to_compute):.2f}",
            f"{summary.padding_share:.0%}",
            f"{summary.peak_memory_gib:.1f}",
            style="bold" if summary.arm in OWN_ARMS else None,
        )
    (console or Console()).print(table)


def write_report(
    output: Path, shapes: Shapes, trained: Shapes, facts: dict[str, Any]
) -> tuple[Path, list[ArmSummary]]:
    """Write `report.html` and `summary.json` into `output`.

    Args:
        output (`Path`): The demo's output folder, with `runs/` and `cost_model.json`.
        shapes (`Shapes`): All documents. trained (`Shapes`): those that the runs trained on, by index.
        facts (`dict`): What else the page tells: source, versions, annotation speed.
    """
    runs = load_runs(output / "runs")
    summaries = summarize(runs)
    cost = CostModel.load(output / "cost_model.json")
    comparison = compare_losses(runs)
    plots = {
        "data": figures.cost_of_data(shapes, cost),
        "timeline": figures.timeline(runs, _telling_steps(runs), trained),
        "bars": figures.idle_and_throughput(summaries),
        "losses": figures.loss_curves(runs),
        "prediction": figures.prediction(runs),
    }
    html = {
        name: figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
        for name, figure in plots.items()
    }
    errors = []
    for arm in ("stock", "balanced", "packed"):
        predicted, measured = (np.asarray(s) for s in figures.microbatch_seconds(runs[arm]))
        errors += (np.abs(predicted - measured) / measured).tolist()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        plotlyjs=get_plotlyjs(),
        plots=html,
        summaries=summaries,
        names=figures.NAMES,
        spread=spread,
        percent=percent,
        by_arm={summary.arm: summary for summary in summaries},
        comparison=comparison,
        evaluation=runs["balanced"][0]["evaluation"],
        stock_evaluation=runs["stock"][0]["evaluation"],
        prediction_error={"median": float(np.median(errors)), "p95": float(np.percentile(errors, 95))},
        fit_error=cost.fit_error,
        facts=facts,
        run=runs["stock"][0],
        num_rounds=len(runs["stock"]),
        num_documents=len(shapes),
        tail=_tail(shapes, cost),
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    summary = {
        "arms": [
            {"arm": s.arm, "samples_per_s": s.samples_per_s, "ratio_to_stock": s.ratio_to_stock,
             "ratio_of_balanced": s.ratio_of_balanced, "ratio_of_packed": s.ratio_of_packed,
             "wall_to_compute": s.wall_to_compute, "idle_fraction": s.idle_fraction,
             "padding_share": s.padding_share, "predicted_idle": s.predicted_idle,
             "peak_memory_gib": s.peak_memory_gib}
            for s in summaries
        ],
        "loss": comparison,
        "evaluation": {"stock": runs["stock"][0]["evaluation"], "balanced": runs["balanced"][0]["evaluation"]},
        "facts": facts,
    }  # fmt: skip
    (output / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return path, summaries


def compare_losses(runs: Runs) -> dict[str, float]:
    """How far the losses and gradient norms of our runs are from the stock run's, at most."""
    stock, *own = (runs[arm][0] for arm in ("stock", *OWN_ARMS))
    sets = [[_samples_of(run, step) for step in range(run["num_steps"])] for run in (stock, *own)]
    norms = np.asarray(stock["grad_norms"])
    return {
        "max_loss_difference": max(float(np.abs(np.subtract(stock["losses"], run["losses"])).max()) for run in own),
        "max_relative_grad_norm_difference": max(
            float(np.abs(np.subtract(run["grad_norms"], norms) / norms).max()) for run in own
        ),
        "same_samples_in_every_step": all(found == sets[0] for found in sets),
    }


def _samples_of(run: dict[str, Any], step: int) -> list[int]:
    return sorted(index for rank in run["ranks"] for slot in rank[step]["samples"] for index in slot)


def _telling_steps(runs: Runs) -> list[int]:
    """Two consecutive steps after the first (it warms up) that show the stock run's mean waiting best."""
    ranks = runs["stock"][0]["ranks"]
    busy = np.array([[r["slot_end_s"][-1] - r["begin_s"] for r in records] for records in ranks])
    share = 1 - busy.mean(axis=0) / busy.max(axis=0)
    if share.size < 3:
        return list(range(share.size))
    pairs = (share[1:-1] + share[2:]) / 2
    first = 1 + int(np.abs(pairs - share.mean()).argmin())
    return [first, first + 1]


def _tail(shapes: Shapes, cost: CostModel) -> dict[str, float]:
    """How heavy the tail is: what share of the cost the costliest tenth has, and the largest ÷ the median."""
    total = np.sort(cost.vision_s(shapes) + cost.llm_s(shapes))
    tenth = max(total.size // 10, 1)
    return {
        "top_tenth_share": float(total[-tenth:].sum() / total.sum()),
        "largest_to_median": float(total[-1] / np.median(total)),
        "vision_share": float(cost.vision_s(shapes).sum() / total.sum()),
    }
