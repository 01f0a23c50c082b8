"""What holds of the sampler for any data: nothing lost, caps, equal counts, resuming anywhere, other ranks."""

import json
import subprocess
import sys
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dflop.data.step_plan import stock_caps
from hf_dflop.errors import BalanceError, DatasetError
from hf_dflop.shapes import Shapes
from tests.unit.data.samplers import build, shapes_of


def steps_of(per_rank: list[list[list[int]]], num_slots: int) -> list[list[int]]:
    assert len({len(microbatches) for microbatches in per_rank}) == 1, "ranks differ in their microbatches"
    return [
        sorted(i for own in per_rank for group in own[k : k + num_slots] for i in group)
        for k in range(0, len(per_rank[0]), num_slots)
    ]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 4), slots=st.integers(1, 4), size=st.integers(1, 4), steps=st.integers(1, 3),
    objective=st.sampled_from(["step", "slot", "stage"]), padded=st.booleans(), seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_nothing_is_lost_and_no_cap_exceeded(
    ranks: int, slots: int, size: int, steps: int, objective: str, padded: bool, seed: int, epoch: int
) -> None:
    shapes = shapes_of(ranks * slots * size * steps, seed)
    caps = stock_caps(shapes, size)
    found, stock = [], []
    for balance, into in ((True, found), (False, stock)):
        for rank in range(ranks):
            sampler = build(shapes, ranks, slots, size, rank, objective=objective, padded=padded, balance=balance)
            sampler.set_epoch(epoch)
            into.append(list(sampler))
            assert len(into[-1]) == len(sampler)
    assert steps_of(found, slots) == steps_of(stock, slots)
    tokens, patches = shapes.llm_tokens, shapes.image_patches
    for group in (group for own in found for group in own):
        assert group
        assert (len(group) * tokens[group].max() if padded else tokens[group].sum()) <= caps.max_tokens
        assert patches[group].sum() <= caps.max_patches


@settings(max_examples=10, deadline=None)
@given(
    ranks=st.integers(1, 3), slots=st.integers(1, 3), seed=st.integers(0, 99), epoch=st.integers(0, 2),
    window=st.sampled_from([1, 1, 3]),
)  # fmt: skip
def test_resuming_at_every_microbatch(ranks: int, slots: int, seed: int, epoch: int, window: int) -> None:
    shapes = shapes_of(ranks * slots * 2 * 4, seed)

    def fresh() -> Any:
        return build(shapes, ranks, slots, 2, ranks - 1, window_steps=window)

    whole = fresh()
    whole.set_epoch(epoch)
    expected = list(whole)
    for done in range(len(expected) + 1):
        running = fresh()
        running.set_epoch(epoch)
        iterator = iter(running)
        for _ in range(done):
            next(iterator)
        state = json.loads(json.dumps(running.state_dict()))
        assert state == running.state_dict(num_microbatches=done)
        resumed = fresh()
        resumed.load_state_dict(state)
        assert list(resumed) == expected[done:]
        resumed.set_epoch(epoch + 1)
        running.set_epoch(epoch + 1)
        assert list(resumed) == list(running), "the epoch after it begins at its beginning"


@settings(max_examples=15, deadline=None)
@given(
    cut=st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1), (2, 2), (1, 1)]), seed=st.integers(0, 99)
)
def test_resuming_on_another_number_of_ranks(cut: tuple[int, int], seed: int) -> None:
    """24 samples a step, cut in any way."""
    shapes = shapes_of(24 * 4, seed)
    before = [list(build(shapes, 2, 3, 4, rank)) for rank in range(2)]
    state = build(shapes, 2, 3, 4).state_dict(num_microbatches=6)
    ranks, slots = cut
    after = []
    for rank in range(ranks):
        sampler = build(shapes, ranks, slots, 24 // (ranks * slots), rank)
        sampler.load_state_dict(state)
        after.append(list(sampler))
    assert steps_of(after, slots) == steps_of(before, 3)[2:]


def test_states_that_are_refused() -> None:
    shapes = shapes_of(48)
    state = build(shapes, 2, 3, 4).state_dict(num_microbatches=2)
    with pytest.raises(DatasetError, match="Resume with the dataset of the interrupted run"):
        build(shapes_of(48, seed=1), 2, 3, 4).load_state_dict(state)
    with pytest.raises(BalanceError, match=r"24 samples a step, and a step has 12 here"):
        build(shapes, 1, 3, 4).load_state_dict(state)
    with pytest.raises(BalanceError, match="before microbatch 2 of a step, which has 2 here"):
        build(shapes, 3, 2, 4).load_state_dict(state)
    with pytest.raises(BalanceError, match="window_steps is 0"):
        build(shapes, 2, 3, 4, window_steps=0)


def test_windows_bring_giants_together_and_keep_the_epoch_and_the_sizes() -> None:
    shapes = shapes_of(24 * 6, seed=5)
    before = steps_of([list(build(shapes, 4, 2, 3, rank)) for rank in range(4)], 2)
    giants = {before[step][0] for step in range(3)}  # one in each step of the first window
    shapes.text_tokens[sorted(giants)] = 60_000
    whole = {
        window: [list(build(shapes, 4, 2, 3, rank, window_steps=window)) for rank in range(4)] for window in (1, 3, 4)
    }
    stock = steps_of(whole[1], 2)
    for window in (3, 4):
        paired = steps_of(whole[window], 2)
        assert [len(step) for step in paired] == [24] * 6
        assert sum(bool(giants & set(step)) for step in paired) == 1
        assert epoch_s(shapes, window) < 0.5 * epoch_s(shapes, 1)  # three steps waited for a giant, and now one does
        for begin in range(0, 6, window):  # no sample leaves its window
            assert sorted(chain(*paired[begin : begin + window])) == sorted(chain(*stock[begin : begin + window]))


def epoch_s(shapes: Shapes, window: int) -> float:
    """Predicted seconds of the first six steps, on four ranks."""
    sampler = build(shapes, 4, 2, 3, window_steps=window)
    list(sampler)
    return sum(sampler.plan_of(0, step).assignment.predicted_s for step in range(6))


def test_the_same_in_another_process() -> None:
    code = (
        "from tests.unit.data.samplers import build, shapes_of\n"
        "print([list(build(shapes_of(96, 7), 2, 3, 4, r, padded=p)) for r in (0, 1) for p in (False, True)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    here = [list(build(shapes_of(96, 7), 2, 3, 4, r, padded=p)) for r in (0, 1) for p in (False, True)]
    assert out.stdout.strip().splitlines()[-1] == str(here)
