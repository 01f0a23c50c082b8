"""The border between computing and waiting lies where the last gradient is there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dflop import clock
from hf_dflop.integrations.timing import StepTimer


def test_a_step_is_cut_where_things_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: 100.0, perf_counter=lambda: passed[0]))
    model = torch.nn.Linear(4, 1)
    timer = StepTimer(model, torch.device("cpu"))
    timer.begin_step(2)
    passed[0] += 2
    model(torch.ones(1, 4)).sum().backward()
    timer.end_slot()
    passed[0] += 3
    model(torch.ones(1, 4)).sum().backward()
    passed[0] += 5  # waiting for the others
    timer.end_sync()
    passed[0] += 1
    timer.end_step()
    (timing,) = timer.drain()
    assert len(timing.slot_end_s) == 2
    assert (timing.begin_s, timing.busy_s, timing.sync_s) == (100.0, 5.0, 5.0)
    assert timing.slot_end_s[0] - timing.begin_s == 2.0
    assert timing.end_s - timing.sync_end_s == 1.0
    assert timer.drain() == []


def test_only_the_last_slot_ends_at_a_gradient() -> None:
    model = torch.nn.Linear(4, 1)
    seen: list[Any] = []
    timer = StepTimer(model, torch.device("cpu"))
    for _ in range(2):
        timer.begin_step(1)
        model(torch.ones(1, 4)).sum().backward()
        timer.end_sync()
        timer.end_step()
    first, second = timer.drain()
    assert len(first.slot_end_s) == len(second.slot_end_s) == 1
    assert first.data_s == 0.0
    assert second.data_s == pytest.approx(second.begin_s - first.end_s)
    timer.close()
    model.weight.register_post_accumulate_grad_hook(seen.append)
    timer.begin_step(1)
    model(torch.ones(1, 4)).sum().backward()
    timer.end_sync()
    timer.end_step()
    assert seen
    assert timer.drain()[0].slot_end_s == []
