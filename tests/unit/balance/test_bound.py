"""The lower bound, against numbers computed by hand and against brute force."""

import itertools

import numpy as np
import pytest

from hf_dflop.balance import lower_bound
from hf_dflop.errors import BalanceError


def test_mean_load() -> None:
    assert lower_bound([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3) == 2.0


def test_largest_sample() -> None:
    assert lower_bound([10.0, 1.0, 1.0], 3) == 10.0


def test_pigeonhole() -> None:
    # k = 1, m = 3: of the 4 largest (5, 4, 4, 3) two share a bucket, at least 4 + 3
    assert lower_bound([5.0, 4.0, 4.0, 3.0], 3) == 7.0
    # k = 2, m = 2: of the 5 largest three share a bucket: 3 x 2
    assert lower_bound([2.0, 2.0, 2.0, 2.0, 2.0], 2) == 6.0


def test_components_apart() -> None:
    # means 3 and 4; the largest samples are 2 and 4
    assert lower_bound([[2.0, 4.0], [2.0, 0.0], [2.0, 4.0]], 2) == 4.0


def test_speeds() -> None:
    # 12 s of work on speeds 3 + 1; the largest sample on the fastest bucket takes 8 / 3
    assert lower_bound([8.0, 2.0, 2.0], 2, speeds=[3.0, 1.0]) == 3.0


def test_no_samples() -> None:
    assert lower_bound(np.zeros((0, 2)), 2) == 0.0


@pytest.mark.parametrize("with_speeds", [False, True])
def test_never_above_the_optimum(with_speeds: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        costs = rng.integers(0, 9, (6, 2)).astype(float)
        speeds = rng.integers(1, 4, 3).astype(float) if with_speeds else np.ones(3)
        best = min(
            max((costs[np.array(choice) == b].sum(axis=0) / speeds[b]).max() for b in range(3))
            for choice in itertools.product(range(3), repeat=6)
        )
        assert lower_bound(costs, 3, speeds) <= best * (1 + 1e-12)


@pytest.mark.parametrize(
    ("costs", "buckets", "speeds", "message"),
    [
        ([1.0, float("nan")], 2, None, "costs is nan at position 1"),
        ([[1.0], [-2.0]], 2, None, r"costs is -2.0 at position \(1, 0\)"),
        ([1.0], 0, None, "num_buckets is 0"),
        ([[1.0, 1.0, 1.0, 1.0]], 1, None, "1 to 3 components"),
        ([1.0, 1.0], 2, [1.0, 0.0], "speeds is 0 at bucket 1"),
        ([1.0, 1.0], 2, [1.0], r"expected \(2,\)"),
        (["a"], 1, None, "must be an array of numbers"),
    ],
)
def test_errors(costs: object, buckets: int, speeds: object, message: str) -> None:
    with pytest.raises(BalanceError, match=message):
        lower_bound(costs, buckets, speeds)
