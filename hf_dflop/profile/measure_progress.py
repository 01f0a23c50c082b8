"""The progress bar of a measurement: which group is measured, sizes done of those allowed, how well it is predicted.

Assumption: a group that is known well enough stops early, so the bar jumps at its end.
"""

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["MeasureProgress"]


class MeasureProgress:
    """A bar on stderr, or nothing."""

    def __init__(self, total: int, *, show: bool | None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}"),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if show is None else show),
        )
        self._task = self._progress.add_task("measuring", total=total, told="")
        self._done = 0

    def __enter__(self) -> "MeasureProgress":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        """A group begins."""
        self._progress.update(self._task, description=title, told="")
        self._done = 0

    def step(self) -> None:
        """A size was measured."""
        self._done += 1
        self._progress.advance(self._task)

    def told(self, errors: Sequence[float]) -> None:
        """How well the sizes were predicted before they were measured."""
        if errors:
            self._progress.update(self._task, told=f"last size predicted within {errors[-1]:.1%}")

    def told_disturbed(self, count: int) -> None:
        """Sizes that scatter even when measured again."""
        if count:
            self._progress.update(self._task, told=f"{count} sizes were disturbed")

    def end(self, allowed: int) -> None:
        """The group is done: what it did not need is skipped."""
        self._progress.advance(self._task, allowed - self._done)
