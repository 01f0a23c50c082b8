"""What this rank of a pipeline did in a step, and when: actions, waiting for receives, sending, summing gradients.

In: calls from the stages, the runtime and the model while a step runs. Out: a `StepRecord`, in seconds.

An action begins when its input is there and ends when its output is: what the rank waited for the input beforehand is
kept apart. On CUDA, moments are events on the stream that computes, so a wait is that of the stream, and nothing is
synchronised while a step runs.

Assumptions: one thread runs the schedule; on CUDA, sends and receives are queued, so that what they take shows in the
waits of the receiver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_dflop.clock import DeviceClock
from hf_dflop.plan.actions import Action, Kind

__all__ = ["NotedReceives", "StepRecord", "StepRecorder"]

Span = tuple[str, float, float]
"""An action, begin and end in seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step of one rank. Moments are seconds since the epoch of the system clock."""

    begin_s: float
    """The first call of the step begins."""
    data_s: float
    """From the end of the step before; 0 for the first, and after a pause."""
    actions: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)
    """Before an action: from when the rank was free until its input was there."""
    sends: list[Span] = field(default_factory=list)
    """Handing over what an action made (`B`: a gradient), as long as it keeps the rank from other work."""
    sum_s: tuple[float, float] | None = None
    """Begin and end of summing gradients over replicas, with waiting for them."""
    meet_s: float
    """All ranks leave a collective together: by this, clocks of several machines are set."""
    sync_end_s: float
    """Gradients are summed and clipped, the optimizer starts."""
    end_s: float


class StepRecorder:
    """Collects moments of the steps of one rank; `drain` gives them as seconds.

    Args:
        device (`torch.device`): that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._previous_end: Any = None
        self._steps: list[tuple[Any, ...]] = []
        self._first_microbatch = 0
        self._clear()

    def _clear(self) -> None:
        self._begin: Any = None
        self._wait: Any = None
        self._actions: list[tuple[Action, Any, Any]] = []
        self._waits: list[tuple[Action, Any, Any]] = []
        self._sends: list[tuple[Action, Any, Any]] = []
        self._sum: tuple[Any, Any] | None = None
        self._met: Any = None
        self._synced: Any = None
        self._num_microbatches = 0

    # Called while a step runs -----------------------------------------------------------------------------------

    def begin_call(self, num_microbatches: int) -> None:
        """A call of the pipeline begins; microbatches of several calls of a step are numbered on."""
        if self._begin is None:
            self._begin = self._clock.now()
        self._first_microbatch = self._num_microbatches
        self._num_microbatches += num_microbatches

    def begin_wait(self) -> None:
        """The rank is about to wait for the input of its next action."""
        if self._begin is not None:  # else an evaluation runs
            self._wait = self._clock.now()

    @contextmanager
    def action(self, stage: int, kind: Kind, microbatch: int) -> Iterator[None]:
        """Around what computes."""
        if self._begin is None:
            yield
            return
        action = Action(stage, kind, self._first_microbatch + microbatch)
        begin = self._clock.now()
        if self._wait is not None:
            self._waits.append((action, self._wait, begin))
            self._wait = None
        yield
        self._actions.append((action, begin, self._clock.now()))

    @contextmanager
    def send(self, stage: int, kind: Kind, microbatch: int) -> Iterator[None]:
        """Around what hands a tensor over."""
        if self._begin is None:
            yield
            return
        begin = self._clock.now()
        yield
        self._sends.append((Action(stage, kind, self._first_microbatch + microbatch), begin, self._clock.now()))

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Around the sum of gradients over replicas."""
        begin = self._clock.now()
        yield
        self._sum = (begin, self._clock.now())

    def met(self) -> None:
        """All ranks have just left a collective; the last call before the step's end counts."""
        self._met = self._synced = self._clock.now()

    def synced(self) -> None:
        """Gradients are what the optimizer takes, as far as is known; the last call before its end counts."""
        self._synced = self._clock.now()

    def end_step(self) -> bool:
        """The optimizer is done; returns whether anything was run since the step before."""
        if self._begin is None or self._met is None:
            self._clear()
            return False
        end = self._clock.now()
        self._steps.append(
            (
                self._begin,
                self._begin if self._previous_end is None else self._previous_end,
                self._actions,
                self._waits,
                self._sends,
                self._sum,
                self._met,
                self._synced,
                end,
            )
        )
        self._clear()
        self._previous_end = end
        return True

    def pause(self) -> None:
        """Something that is no training step comes next (evaluation, saving): do not count it as data time."""
        self._previous_end = None

    # Afterwards -------------------------------------------------------------------------------------------------

    def drain(self, *, keep: int = 0) -> list[StepRecord]:
        """The steps since the last call, oldest first, but for the newest `keep`. Waits for the device."""
        cut = max(0, len(self._steps) - keep)
        steps, self._steps = self._steps[:cut], self._steps[cut:]
        seconds = self._clock.seconds

        def spans(raw: list[tuple[Action, Any, Any]]) -> list[Span]:
            return [(str(action), seconds(begin), seconds(end)) for action, begin, end in raw]

        return [
            StepRecord(
                begin_s=seconds(begin),
                data_s=seconds(begin) - seconds(previous),
                actions=spans(actions),
                waits=spans(waits),
                sends=spans(sends),
                sum_s=None if summed is None else (seconds(summed[0]), seconds(summed[1])),
                meet_s=seconds(met),
                sync_end_s=seconds(synced),
                end_s=seconds(end),
            )
            for begin, previous, actions, waits, sends, summed, met, synced, end in steps
        ]


class NotedReceives(dict[tuple[int, int], list[Any]]):
    """The runtime's pending receives: taking one out is when the rank begins to wait for it."""

    def __init__(self, recorder: StepRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def pop(self, *key: Any) -> Any:
        works = super().pop(*key)
        if works:
            self._recorder.begin_wait()
        return works
