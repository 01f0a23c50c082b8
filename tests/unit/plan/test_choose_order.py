"""The order of the microbatches in time."""

from itertools import permutations

import numpy as np
import pytest

from hf_dflop.plan import (
    Durations,
    choose_order,
    compile_order,
    compile_schedule,
    data_aware_order,
    make_order,
    simulate_order,
    step_seconds,
)


def _uneven(stages: int, num_microbatches: int, seed: int, replicas: int = 1) -> Durations:
    rng = np.random.default_rng(seed)
    shape = (stages, replicas, num_microbatches)
    forward = rng.lognormal(0, 0.8, shape)
    return Durations.of(forward, 2 * forward)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", "data-aware"])
@pytest.mark.parametrize("stage_rank", [(0, 1), (0, 1, 2), (0, 1, 2, 1, 2), (0, 0, 1)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_never_worse_and_true_to_its_word(schedule: str, stage_rank: tuple[int, ...], replicas: int) -> None:
    better = 0
    for seed in range(6):
        durations = _uneven(len(stage_rank), 6, seed, replicas)
        chosen = choose_order(durations, schedule=schedule, stage_rank=stage_rank, work=20_000)
        assert chosen.step_s <= chosen.given_s
        assert sorted(chosen.microbatches.tolist()) == list(range(6))
        assert simulate_order(chosen.order, durations).step_s == pytest.approx(chosen.step_s, rel=1e-12)
        better += chosen.step_s < chosen.given_s
    assert better >= 2


def test_near_the_best_of_all_orders() -> None:
    compiled = {
        position: compile_order(make_order("1f1b", stage_rank=(0, 1), num_microbatches=6, microbatches=position))
        for position in permutations(range(6))
    }
    for seed in range(4):
        durations = _uneven(2, 6, seed)
        best = min(step_seconds(order, durations) for order in compiled.values())
        chosen = choose_order(durations, schedule="1f1b", stage_rank=(0, 1))
        assert chosen.step_s == pytest.approx(best, rel=0.01)


def test_every_rank_chooses_the_same() -> None:
    durations = _uneven(3, 9, 1)
    first, second = (choose_order(durations, schedule="data-aware", stage_rank=(0, 1, 2), seed=7) for _ in range(2))
    assert first.order == second.order


def test_one_microbatch_has_one_order() -> None:
    chosen = choose_order(_uneven(2, 1, 0), schedule="data-aware", stage_rank=(0, 1))
    assert chosen.microbatches.tolist() == [0]


def test_equal_seconds_give_1f1b() -> None:
    durations = Durations.of(np.ones((3, 5)), 2 * np.ones((3, 5)))
    order = data_aware_order(durations, stage_rank=(0, 1, 2))
    wanted = make_order("1f1b", stage_rank=(0, 1, 2), num_microbatches=5)
    assert simulate_order(order, durations).step_s == simulate_order(wanted, durations).step_s


def test_memory_limit() -> None:
    durations = _uneven(3, 8, 3)
    for limit in (1, 2, 8):
        order = data_aware_order(durations, stage_rank=(0, 1, 2), max_in_flight=[limit] * 3)
        assert simulate_order(order, durations).peak_in_flight.max() <= limit


def test_a_list_schedule_overtakes_1f1b_where_a_stage_starves() -> None:
    """More microbatches in flight than 1F1B keeps hide an encoder that is slow now and then."""
    rng = np.random.default_rng(5)
    forward = np.stack([rng.lognormal(0, 1.0, 12), np.ones(12)])
    durations = Durations.of(forward, 2 * forward)
    order = data_aware_order(durations, stage_rank=(0, 1), max_in_flight=[6, 6])
    fixed = step_seconds(compile_schedule("1f1b", (0, 1), 12), durations)
    assert simulate_order(order, durations).step_s < fixed
