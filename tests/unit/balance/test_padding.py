"""Runs by length: the least padding of all groupings, and even runs within caps."""

import itertools

import numpy as np
import pytest

from hf_dflop.balance.objective import OBJECTIVES
from hf_dflop.balance.padding import even_runs, least_padding
from hf_dflop.balance.ticks import to_seconds, to_ticks


def padded_total(length: np.ndarray, group: np.ndarray) -> int:
    return sum(int((group == g).sum() * length[group == g].max()) for g in np.unique(group))


def test_least_padding_by_hand() -> None:
    # 9, 8 | 2, 1, 1: 18 + 6; any other cut costs more
    group, total = least_padding(np.array([9, 8, 2, 1, 1]), 2)
    assert (group.tolist(), total) == ([0, 0, 1, 1, 1], 24)


def test_least_padding_is_the_least_of_all_groupings() -> None:
    rng = np.random.default_rng(2)
    for num_groups in (1, 2, 3, 4):
        for _ in range(6):
            length = np.sort(rng.integers(0, 12, 6))[::-1].copy()
            group, total = least_padding(length, num_groups)
            assert sorted(np.unique(group)) == list(range(num_groups))
            assert padded_total(length, group) == total
            best = min(
                padded_total(length, np.array(choice))
                for choice in itertools.product(range(num_groups), repeat=6)
                if len(set(choice)) == num_groups
            )
            assert total == best


def test_least_padding_of_many() -> None:
    length = np.sort(np.random.default_rng(0).integers(1, 1000, 300))[::-1].copy()
    totals = [least_padding(length, groups)[1] for groups in (1, 2, 10, 100, 300)]
    assert totals[0] == 300 * length[0]
    assert totals[-1] == length.sum()
    assert totals == sorted(totals, reverse=True)


def test_even_runs() -> None:
    none = np.zeros((6, 0), dtype=np.int64)
    no_caps, no_flags = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    length = np.array([6, 3, 3, 2, 1, 1])
    zero = np.zeros(6, dtype=np.int64)
    # 6 | 3, 3 | 2, 1, 1: costs 6, 6, 6
    assert even_runs(length, zero, none, no_caps, no_flags, 3).tolist() == [0, 1, 1, 2, 2, 2]
    # fewer runs than groups would do, yet every group gets a sample
    equal = np.array([1, 1, 1, 1, 1, 1])
    assert sorted(set(even_runs(equal, zero, none, no_caps, no_flags, 4).tolist())) == [0, 1, 2, 3]
    # at most 2 patches per microbatch
    ones = np.ones((6, 1), dtype=np.int64)
    capped = even_runs(length, zero, ones, np.array([2]), np.array([False]), 3)
    assert capped.tolist() == [0, 0, 1, 1, 2, 2]


def test_ticks_are_exact_and_do_not_overflow() -> None:
    for largest in (1e-300, 3.7e-3, 1.0, 1e30):
        seconds = np.array([largest, largest / 2, 0.0])
        ticks, bits = to_ticks(seconds, num_terms=1000, largest=largest)
        assert int(ticks.max()) * 1000 < 2**45
        assert np.allclose(to_seconds(ticks, bits), seconds, rtol=1e-9, atol=0)
    assert to_ticks(np.zeros(2), num_terms=2, largest=0.0)[0].tolist() == [0, 0]


@pytest.mark.parametrize(("name", "value"), [("step", 7), ("slot", 7), ("stage", 10), ("pipeline", 4)])
def test_objectives_by_hand(name: str, value: int) -> None:
    # rank 0: (1, 4), (0, 2); rank 1: (3, 1), (1, 1): step 7 and 6; slot 5 + 2; stage (3 + 4) + (1 + 2)
    vision, llm = np.array([[1, 0], [3, 1]]), np.array([[4, 2], [1, 1]])
    assert OBJECTIVES[name](vision, llm) == value
