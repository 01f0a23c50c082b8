"""Idle time from each rank's own durations, by hand."""

import numpy as np
import pytest

from hf_dflop.integrations.steplog import step_logs


def test_a_rank_waits_for_what_it_synchronises_longer_than_the_slowest() -> None:
    # data, busy, sync, step: rank 0 computes 4 s and reduces in 1 s; rank 1 computes 2 s and waits 2 s more.
    measured = np.array([[[1.0, 4.0, 1.0, 7.0]], [[1.0, 2.0, 3.0, 7.0]]])
    logs = step_logs(measured, [None])
    assert logs["dflop/idle_s_rank0"] == 0.0
    assert logs["dflop/idle_s_rank1"] == 2.0
    assert logs["dflop/idle_fraction"] == pytest.approx(1.0 / 7.0)
    assert logs["dflop/slowest_rank"] == 0
    assert (logs["dflop/busy_s_max"], logs["dflop/busy_s_mean"], logs["dflop/sync_s"]) == (4.0, 3.0, 1.0)


def test_ranks_that_take_turns_at_being_slow_all_wait() -> None:
    measured = np.array([[[0, 4, 1, 6], [0, 2, 3, 6]], [[0, 2, 3, 6], [0, 4, 1, 6]]], dtype=float)
    logs = step_logs(measured, [None, None])
    assert logs["dflop/idle_s_rank0"] == logs["dflop/idle_s_rank1"] == 1.0
    assert logs["dflop/busy_s_max"] == 4.0


def test_without_gradient_hooks_nothing_is_claimed_about_waiting() -> None:
    measured = np.array([[[0.5, np.nan, np.nan, 6.0]]])
    assert step_logs(measured, [None]) == {"dflop/step_s": 6.0, "dflop/data_s": 0.5}


def test_many_ranks_are_summarised() -> None:
    logs = step_logs(np.ones((17, 1, 4)), [None])
    assert not [key for key in logs if "rank0" in key]
    assert logs["dflop/busy_s_max"] == 1.0
