"""Giants paired across steps: the same samples in as many steps of the same sizes, never predicted slower."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dflop.balance import pair_giants
from hf_dflop.errors import BalanceError


def seconds(cost: Any, steps: Any, num_ranks: int) -> float:
    """Of each step the larger of mean load and largest sample."""
    cost = np.asarray(cost, dtype=float)
    return sum(max(cost[step].max(), cost[step].sum() / num_ranks) for step in steps)


def stock(sizes: list[int]) -> list[Any]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def test_two_lone_giants_share_a_step() -> None:
    cost = [10, 1, 1, 1, 1, 1, 10, 1]
    steps = pair_giants(cost, [4, 4], 2)
    assert seconds(cost, stock([4, 4]), 2) == 20
    assert seconds(cost, steps, 2) == 13
    assert [sorted(np.asarray(cost)[step].tolist()) for step in steps] == [[1, 1, 10, 10], [1, 1, 1, 1]]


def test_nothing_moves_without_giants_or_gain() -> None:
    for cost, ranks in (([3, 1, 2, 2, 1, 3, 2, 2], 2), ([10, 1, 1, 1, 1, 1, 1, 1], 2), ([0] * 8, 2), ([9, 1] * 4, 1)):
        assert [step.tolist() for step in pair_giants(cost, [4, 4], ranks)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_giants_of_like_size_belong_together() -> None:
    cost = np.ones(32)
    cost[[0, 8, 16, 24]] = [40, 20, 21, 39]
    steps = pair_giants(cost, [8] * 4, 2)
    assert seconds(cost, stock([8] * 4), 2) == 120
    assert seconds(cost, steps, 2) == (79 + 6) / 2 + (41 + 6) / 2 + 4 + 4
    assert sorted(sorted(cost[step][cost[step] > 1].tolist()) for step in steps) == [[], [], [20, 21], [39, 40]]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5).flatmap(
        lambda sizes: st.tuples(
            st.just(sizes), st.lists(st.integers(0, 60), min_size=sum(sizes), max_size=sum(sizes)), st.integers(1, 4)
        )
    )
)
def test_properties(case: tuple[list[int], list[int], int]) -> None:
    sizes, cost, ranks = case
    steps = pair_giants(cost, sizes, ranks)
    assert [len(step) for step in steps] == sizes
    assert sorted(int(i) for step in steps for i in step) == list(range(len(cost)))
    assert seconds(cost, steps, ranks) <= seconds(cost, stock(sizes), ranks) + 1e-9
    again = pair_giants(cost, sizes, ranks)
    assert all(np.array_equal(one, other) for one, other in zip(steps, again, strict=True))


@pytest.mark.parametrize(
    ("cost", "sizes", "ranks", "message"),
    [
        ([1.0, 2.0], [1], 1, "sizes add up to 1"),
        ([1.0], [1, 0], 1, "size >= 1"),
        ([1.0], [1], 0, "num_ranks is 0"),
        ([float("nan")], [1], 1, "nan at position 0"),
    ],
)
def test_errors(cost: list[float], sizes: list[int], ranks: int, message: str) -> None:
    with pytest.raises(BalanceError, match=message):
        pair_giants(cost, sizes, ranks)
