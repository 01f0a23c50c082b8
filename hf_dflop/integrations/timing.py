"""Where the seconds of an optimizer step go on this rank.

A step under DDP is: fetch and collate the microbatches (`data`), compute forward and backward of every slot
(`busy`), wait in the gradient all-reduce for the other ranks (`sync`), clip and update (`optimizer`). All ranks leave
the all-reduce together, so `sync` of the slowest rank is what communication and clipping cost everybody, and what
another rank spends beyond that is time spent waiting: `idle_s = sync_s - min over ranks of sync_s`.

The border between `busy` and `sync` lies *inside* the last backward: it is the moment when the last gradient of this
rank was accumulated, seen by a post-accumulate-grad hook. On CUDA it is an event on the compute stream, so that
nothing is synchronised during the step.

Assumptions: gradients meet once per step (DDP with accumulation). Where parameters are sharded (FSDP), ranks meet in
every layer, busy and waiting cannot be told apart in this way, and `sync_s` is NaN.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from hf_dflop.clock import DeviceClock

__all__ = ["StepTimer", "StepTiming"]


@dataclass(kw_only=True, slots=True)
class StepTiming:
    """One step of one rank. Moments are seconds since the epoch of the system clock."""

    begin_s: float
    """The first forward starts."""
    data_s: float
    """From the end of the step before to `begin_s`: fetching, collating, counting label tokens over the ranks."""
    slot_end_s: list[float] = field(default_factory=list)
    """When each slot's backward was done; of the last slot, when its last own gradient was there."""
    sync_end_s: float = float("nan")
    """All gradients reduced and clipped, the optimizer starts."""
    end_s: float = float("nan")
    """The optimizer is done."""

    @property
    def busy_s(self) -> float:
        """Own forward and backward computation of the step."""
        return self.slot_end_s[-1] - self.begin_s if self.slot_end_s else float("nan")

    @property
    def sync_s(self) -> float:
        """From the last own gradient until the optimizer starts."""
        return self.sync_end_s - self.slot_end_s[-1] if self.slot_end_s else float("nan")

    @property
    def step_s(self) -> float:
        """The whole step, data included."""
        return self.end_s - self.begin_s + self.data_s


class StepTimer:
    """Collects a `StepTiming` per optimizer step from the events of a `TrainerCallback`.

    Args:
        model (`torch.nn.Module`): Its trainable parameters get a hook each, until `close()`.
        device (`torch.device`): The device that computes.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._armed = False
        self._last_gradient: Any = None
        self._previous_end: Any = None
        self._sync_end: Any = None
        self._moments: list[Any] = []
        self._num_slots = 0
        self._steps: list[tuple[Any, Any, list[Any], Any, Any]] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
            for parameter in model.parameters()
            # Under FSDP, ranks wait for each other all through the step, and this border would hide it.
            if parameter.requires_grad and not hasattr(parameter, "full_tensor")
        ]

    def _on_gradient(self, _: torch.Tensor) -> None:
        if self._armed:
            self._last_gradient = self._clock.now()

    def begin_step(self, num_slots: int) -> None:
        """The first forward of a step of `num_slots` microbatches is about to start."""
        self._moments = [self._clock.now()]
        self._num_slots = num_slots
        self._last_gradient = None
        self._armed = num_slots == 1

    def end_slot(self) -> None:
        """A backward that does not reduce gradients is done."""
        self._moments.append(self._clock.now())
        self._armed = len(self._moments) == self._num_slots

    def end_sync(self) -> None:
        """Gradients are reduced and clipped."""
        self._armed = False
        self._sync_end = self._clock.now()

    def end_step(self) -> None:
        """The optimizer is done."""
        end = self._clock.now()
        begin = self._moments[0]
        ends = [*self._moments[1:], self._last_gradient] if self._last_gradient is not None else []
        self._steps.append((self._previous_end or begin, begin, ends, self._sync_end, end))
        self._previous_end = end

    def drain(self) -> list[StepTiming]:
        """The steps since the last call, oldest first. Waits for the device."""
        steps, self._steps = self._steps, []
        timings = []
        for previous, begin, ends, sync_end, end in steps:
            begin_s = self._clock.seconds(begin)
            timings.append(
                StepTiming(
                    begin_s=begin_s,
                    data_s=begin_s - self._clock.seconds(previous),
                    slot_end_s=[self._clock.seconds(moment) for moment in ends],
                    sync_end_s=self._clock.seconds(sync_end),
                    end_s=self._clock.seconds(end),
                )
            )
        return timings

    def pause(self) -> None:
        """Something that is no training step comes next (evaluation, saving): do not count it as data time."""
        self._previous_end = None

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
