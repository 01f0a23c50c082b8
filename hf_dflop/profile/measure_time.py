"""Seconds and bytes of one computation, forward and backward apart, on a CPU or a GPU.

In: a function that runs a forward and gives the tensors to start the backward from. Out: a `Timing`. Seconds are
device events on a GPU and the monotonic clock on a CPU. Bytes are those of the allocator on a GPU; on a CPU those of
every storage that the forward and the backward allocate, counted as they come and go (`AllocationCounter`): what a
kernel uses inside itself is not seen there. Gradients of parameters exist beforehand and are not counted.
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
    cpu_share: float = 1.0
    """Of the median repeat's seconds, the share in which this process had the CPU (one thread; 1 elsewhere)."""


class AllocationCounter(TorchDispatchMode):
    """Counts bytes of storages that operators make, and notices when they die.

    `live_bytes` is what is alive now, `peak_bytes` the most that ever was, since the counter was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        """Storage -> its bytes; 0 for those that were there before."""
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), is_new=False)
        outputs = func(*args, **(kwargs or {}))
        self._meet(outputs, is_new=True)
        return outputs

    def _meet(self, values: Any, *, is_new: bool) -> None:
        for leaf in tree_leaves(values):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes() if is_new else 0
            self._watched[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))  # type: ignore[misc]
            self.live_bytes += self._sizes[key]
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)
        self._watched.pop(key, None)


def _starts(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in outputs if tensor.requires_grad]


def _backward(starts: list[torch.Tensor]) -> None:
    torch.autograd.backward(starts, [torch.ones_like(tensor) for tensor in starts])


def measure_bytes(run: Run, device: torch.device) -> tuple[float, float]:
    """Bytes kept after the forward, and the peak of forward and backward beyond them.

    Run the computation once before, so that parameters have their gradients.
    """
    if device.type == "cuda":
        return _allocator_bytes(run, device)
    with AllocationCounter() as counter:
        outputs = run()
        kept = counter.live_bytes
        starts = _starts(outputs)
        if starts:
            _backward(starts)
        peak = counter.peak_bytes
        del outputs, starts
    return float(kept), float(max(peak - kept, 0))


def _allocator_bytes(run: Run, device: torch.device) -> tuple[float, float]:
    """The same from the GPU's allocator, which also sees what kernels ask for."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    kept = torch.cuda.memory_allocated(device) - before
    starts = _starts(outputs)
    if starts:
        _backward(starts)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del outputs, starts
    return float(max(kept, 0)), float(max(peak - kept, 0))


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


_Once = tuple[float, float, float]
"""Forward seconds, backward seconds, share of the CPU."""


def _once(run: Run, clock: _Clock) -> _Once:
    clock.finish()
    cpu, wall = time.process_time(), time.perf_counter()
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
    alone = not clock.on_gpu and torch.get_num_threads() == 1
    share = min((time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9), 1.0) if alone else 1.0
    return clock.between(start, middle), clock.between(resumed, end) if starts else 0.0, share


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
    for _ in range(2 if clock.on_gpu else 1):  # warm-up: gradients, kernels, caches
        for run in runs:
            _once(run, clock)
    seconds: list[list[_Once]] = [[] for _ in runs]
    for repeat in range(max_repeats):
        for index, run in enumerate(runs):
            seconds[index].append(_once(run, clock))
        spent = time.perf_counter() - began
        if repeat + 1 >= min(min_repeats, 3) and spent > budget_s:
            break
        if repeat + 1 >= min_repeats and all(_error(timed) < target for timed in seconds):
            break
    return [_summarise(timed) for timed in seconds]


def _error(timed: Sequence[_Once]) -> float:
    """Standard error of the median of forward + backward, relative (1.25 σ / √n, σ from the quartiles)."""
    total = np.asarray(timed)[:, :2].sum(axis=1)
    low, middle, high = np.percentile(total, [25, 50, 75])
    return float(1.25 * (high - low) / 1.35 / np.sqrt(total.size) / middle)


def _summarise(timed: Sequence[_Once]) -> Timing:
    low, middle, high = np.percentile(np.asarray(timed), [25, 50, 75], axis=0)
    return Timing(
        forward_s=float(middle[0]),
        forward_spread_s=float(high[0] - low[0]),
        backward_s=float(middle[1]),
        backward_spread_s=float(high[1] - low[1]),
        num_repeats=len(timed),
        cpu_share=float(middle[2]),
    )
