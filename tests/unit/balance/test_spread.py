"""Every microbatch gets a sample with an image wherever that is possible."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dflop.balance import OBJECTIVES, assign
from hf_dflop.errors import BalanceError
from tests.unit.balance.test_assign import all_groups, cost, stock


def test_by_hand() -> None:
    # Best without images in mind: {4}, {1, 3}; but the images are samples 1 and 2 of 1 s and 3 s.
    llm, spread = [4, 1, 3], np.array([False, True, True])
    free = assign([0, 0, 0], llm, num_ranks=2, num_slots=1, objective="step", padded=False)
    assert (free.predicted_s, free.is_spread) == (4, None)
    bound = assign([0, 0, 0], llm, num_ranks=2, num_slots=1, objective="step", padded=False, spread=spread)
    assert (bound.predicted_s, bound.is_spread) == (5, True)
    assert sorted(sorted(slots[0].tolist()) for slots in bound.groups) == [[0, 1], [2]]


def test_too_few_images_are_left_out_of_account() -> None:
    spread = np.array([True, False, False, False])
    free = assign([0] * 4, [3, 2, 1, 2], num_ranks=2, num_slots=1, objective="step", padded=False)
    few = assign([0] * 4, [3, 2, 1, 2], num_ranks=2, num_slots=1, objective="step", padded=False, spread=spread)
    assert (few.predicted_s, few.is_spread) == (free.predicted_s, False)
    assert few.place().tolist() == free.place().tolist()


def test_caps_go_first() -> None:
    # 10 + 1 in one, 6 + 5 in the other: the images (10 and 1) cannot be parted.
    result = assign(
        [0] * 4, [10, 1, 6, 5], num_ranks=2, num_slots=1, objective="step", padded=False,
        tokens=[10, 1, 6, 5], max_tokens=11, spread=np.array([True, True, False, False]),
    )  # fmt: skip
    assert result.is_spread is False
    assert sorted(sorted(slots[0].tolist()) for slots in result.groups) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("objective", "padded"), [*itertools.product(OBJECTIVES, (False, True))])
def test_against_brute_force(objective: str, padded: bool) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        vision, llm = rng.integers(0, 9, 6) * (rng.random(6) < 0.6), rng.integers(1, 9, 6)
        spread = rng.permutation(6) < 4
        best = min(
            cost(groups, vision, llm, objective, padded)
            for groups in all_groups(6, 2, 2)
            if all(spread[group].any() for rank in groups for group in rank)
        )
        found = assign(
            vision, llm, num_ranks=2, num_slots=2, objective=objective, padded=padded, spread=spread, seed=seed
        )
        assert found.is_spread
        assert found.predicted_s <= 1.15 * best, (seed, found.predicted_s, best)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_microbatch_has_an_image_when_there_are_enough(data: st.DataObject) -> None:
    ranks, slots = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    n = data.draw(st.integers(ranks * slots, ranks * slots + 40))
    objective, padded = data.draw(st.sampled_from(list(OBJECTIVES))), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    images = data.draw(st.integers(ranks * slots, n))  # as few as there are microbatches
    spread = rng.permutation(n) < images
    vision, llm = spread * rng.lognormal(0, 1, n), rng.lognormal(0, 1, n)
    arguments = {"num_ranks": ranks, "num_slots": slots, "objective": objective, "padded": padded}
    result = assign(vision, llm, baseline=stock(n, ranks, slots, 1), spread=spread, **arguments)
    result.validate(n)
    assert result.is_spread
    assert all(spread[group].any() for rank in result.groups for group in rank)
    again = assign(vision, llm, baseline=stock(n, ranks, slots, 1), spread=spread, **arguments)
    assert again.place().tolist() == result.place().tolist()


def test_one_image_per_microbatch_at_size() -> None:
    rng = np.random.default_rng(0)
    spread = rng.permutation(512) < 64
    vision, llm = spread * rng.lognormal(0, 1, 512), rng.lognormal(0, 0.5, 512)
    for padded in (False, True):
        result = assign(vision, llm, num_ranks=8, num_slots=8, objective="step", padded=padded, spread=spread)
        assert result.is_spread
        assert result.gap < (0.02 if not padded else 0.5), result.gap


def test_a_wrong_mask_is_an_error() -> None:
    for wrong in ([1, 0, 1], [True, False], np.ones((3, 1), dtype=bool)):
        with pytest.raises(BalanceError, match=r"expected \(3,\) booleans"):
            assign([0] * 3, [1, 2, 3], num_ranks=1, num_slots=2, objective="step", padded=False, spread=wrong)
