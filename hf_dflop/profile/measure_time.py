"""Seconds and bytes of one computation, forward and backward apart, on a CPU or a GPU.

In: a function that runs a forward and gives the tensors to start the backward from. Out: a `Timing`. Seconds are
device events on a GPU and the monotonic clock on a CPU. Bytes are those of every storage that the forward and the
backward allocate, counted as they come and go (`AllocationCounter`), on every device alike; what a kernel uses inside
itself is not seen. Gradients of parameters exist beforehand and are not counted.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AllocationCounter", "Run", "Timing", "measure_bytes", "time_runs"]

Run = Callable[[], Sequence[torch.Tensor]]
"""Runs a forward; gives its outputs. Those that require a gradient are where the backward starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of the repeats, and what they come to."""

    forward_s: float
    forward_spread_s: float
    backward_s: float
    backward_spread_s: float
    num_repeats: int


class AllocationCounter(TorchDispatchMode):
    """Counts bytes of storages that operators make, and notices when they die.

    `live_bytes` is what is alive now, `peak_bytes` the most that ever was, since the counter was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                key = leaf.untyped_storage()._cdata
                if key not in self._seen:
                    self._known.add(key)
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return outputs

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen or key in self._known:
            return
        size = storage.nbytes()
        self._seen[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._seen.pop(key, 0)


def _starts(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in outputs if tensor.requires_grad]


def _backward(starts: list[torch.Tensor]) -> None:
    torch.autograd.backward(starts, [torch.ones_like(tensor) for tensor in starts])


def measure_bytes(run: Run) -> tuple[float, float]:
    """Bytes kept after the forward, and the peak of forward and backward beyond them.

    Run the computation once before, so that parameters have their gradients.
    """
    with AllocationCounter() as counter:
        outputs = run()
        kept = counter.live_bytes
        starts = _starts(outputs)
        if starts:
            _backward(starts)
        peak = counter.peak_bytes
        del outputs, starts
    return float(kept), float(max(peak - kept, 0))


class _Clock:
    """Marks points in time on the device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.device = device

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self.on_gpu else end - start


def _once(run: Run, clock: _Clock) -> tuple[float, float]:
    clock.finish()
    start = clock.mark()
    outputs = run()
    middle = clock.mark()
    starts = _starts(outputs)
    if starts:
        gradients = [torch.ones_like(tensor) for tensor in starts]
        clock.finish()
        resumed = clock.mark()
        torch.autograd.backward(starts, gradients)
        end = clock.mark()
    clock.finish()
    return clock.between(start, middle), clock.between(resumed, end) if starts else 0.0


def time_runs(
    runs: Sequence[Run],
    device: torch.device,
    *,
    min_repeats: int = 5,
    max_repeats: int = 25,
    target: float = 0.01,
    budget_s: float = 10.0,
) -> list[Timing]:
    """Time several computations turn by turn, so that what disturbs the machine disturbs all.

    Args:
        runs: computations to compare.
        device (`torch.device`): where they run.
        min_repeats, max_repeats (`int`): of each.
        target (`float`, defaults to 0.01): stop when the standard error of every median is below this share of it.
        budget_s (`float`, defaults to 10): stop after these seconds, but not before 3 repeats.

    Returns:
        `list[Timing]`: one for each run.
    """
    clock = _Clock(device)
    began = time.perf_counter()
    for run in runs:  # warm-up: gradients, kernels, caches
        _once(run, clock)
    seconds: list[list[tuple[float, float]]] = [[] for _ in runs]
    for repeat in range(max_repeats):
        for index, run in enumerate(runs):
            seconds[index].append(_once(run, clock))
        spent = time.perf_counter() - began
        if repeat + 1 >= min(min_repeats, 3) and spent > budget_s:
            break
        if repeat + 1 >= min_repeats and all(_error(timed) < target for timed in seconds):
            break
    return [_summarise(timed) for timed in seconds]


def _error(timed: Sequence[tuple[float, float]]) -> float:
    """Standard error of the median of forward + backward, relative (1.25 σ / √n, σ from the quartiles)."""
    total = np.asarray(timed).sum(axis=1)
    low, middle, high = np.percentile(total, [25, 50, 75])
    return float(1.25 * (high - low) / 1.35 / np.sqrt(total.size) / middle)


def _summarise(timed: Sequence[tuple[float, float]]) -> Timing:
    quartiles = np.percentile(np.asarray(timed), [25, 50, 75], axis=0)
    return Timing(
        forward_s=float(quartiles[1, 0]),
        forward_spread_s=float(quartiles[2, 0] - quartiles[0, 0]),
        backward_s=float(quartiles[1, 1]),
        backward_spread_s=float(quartiles[2, 1] - quartiles[0, 1]),
        num_repeats=len(timed),
    )
