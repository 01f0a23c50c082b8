"""A recorded run → one self-contained HTML page that says who waited for whom, and shows it.

Inputs: a loaded trace and its report. Output: the page as text; scripts are inside it, nothing is fetched.
"""

from pathlib import Path

from hf_dflop.integrations import report_figures as figures
from hf_dflop.integrations.report import StragglerReport, some_samples
from hf_dflop.integrations.trace import Trace

__all__ = ["render_report"]

_TEMPLATE = Path(__file__).with_name("report_page.html.j2")


def render_report(trace: Trace, report: StragglerReport) -> str:
    """The page.

    Args:
        trace (`Trace`): as `load_trace` gave it.
        report (`StragglerReport`): of that trace.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    ranks = figures.pick_ranks(report)
    windows = figures.pick_steps(trace)
    plots = {}
    if report.slowest_rank is not None:
        plots["seconds"] = figures.seconds_per_rank(report, ranks)
        plots["waiting"] = figures.waiting_over_steps(trace)
    if (found := figures.accuracy(trace, report)) is not None:
        plots["accuracy"] = found
    timelines = {name: figures.timeline(trace, ranks, steps) for name, steps in windows.items()}
    config = {"displayModeBar": False, "responsive": True}

    def html(figure: object) -> str:
        return figure.to_html(full_html=False, include_plotlyjs=False, config=config)  # type: ignore[attr-defined]

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["ms"] = _duration
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["samples"] = some_samples
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        plotlyjs=get_plotlyjs(),
        plots={name: html(figure) for name, figure in plots.items()},
        timelines={name: html(figure) for name, figure in timelines.items()},
        windows=windows,
        report=report,
        verdict=report.verdict(),
        slow={rank.rank for rank in report.slow_ranks},
        num_hidden=len(report.ranks) - len(ranks),
        data_share=sum(rank.data_s for rank in report.ranks) / len(report.ranks) / report.step_s,
        busy_share=sum(rank.busy_s for rank in report.ranks) / len(report.ranks) / report.step_s,
        colors=figures.COLORS,
    )


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "–"
    return f"{seconds:,.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:.1f} ms"
