"""Orders as data, and what makes one unrunnable."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dflop.errors import PlanError
from hf_dflop.plan import ORDERS, SCHEDULES, Kind, dry_run, format_order, make_order, parse_order, stage_ranks


def test_every_schedule_of_a_plan_has_an_order() -> None:
    assert set(SCHEDULES) <= set(ORDERS)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(sorted(ORDERS)),
    stage_rank=st.sampled_from([(0,), (0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 2, 1, 2), (0, 0, 1, 0, 1), (0, 1, 0, 1)]),
    num_microbatches=st.integers(1, 9),
    first=st.integers(0, 2),
    data=st.data(),
)
def test_every_order_runs_prints_and_parses(schedule, stage_rank, num_microbatches, first, data) -> None:
    microbatches = data.draw(st.permutations(range(num_microbatches)))
    first = min(first, len(stage_rank))
    order = make_order(
        schedule,
        stage_rank=stage_rank,
        num_microbatches=num_microbatches,
        first_backward_stage=first,
        microbatches=microbatches,
    )
    assert parse_order(format_order(order)) == order
    forwards = [a.microbatch for a in order[0] if a.stage == 0 and a.kind is Kind.FORWARD]
    assert forwards == microbatches
    for rank, actions in enumerate(order):
        assert {a.stage for a in actions} == {s for s, r in enumerate(stage_rank) if r == rank}
        assert all(a.kind is Kind.FORWARD or a.stage >= first for a in actions)
    seen = set()
    for action in dry_run(order):
        if action.kind is Kind.FORWARD and action.stage:
            assert (action.stage - 1, "F", action.microbatch) in seen
        seen.add((action.stage, "F" if action.kind is Kind.FORWARD else "B", action.microbatch))


def test_an_encoder_on_the_first_stages_rank_runs_with_it() -> None:
    order = make_order("1f1b", stage_rank=stage_ranks(2, 2, colocated=True), num_microbatches=2)
    assert format_order(order) == "0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1\n2F0 2B0 2F1 2B1"


def test_a_frozen_encoder_has_no_backward() -> None:
    order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=2, first_backward_stage=1)
    assert format_order(order) == "0F0 0F1\n1F0 1B0 1F1 1B1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0F0 0F0 0B0", "runs 0F0 2 times"),
        ("0F0 0B0 0F1", "1 backward of 2 microbatches"),
        ("0F0 0B0 0I0 0W0", "1 backward, 1 backward_input"),
        ("0F0 0B0\n0F1 0B1", "stage 0 is on ranks"),
        ("0F0 0B0\n1F0", "stage 0 has backwards but stage 1 has none"),
        ("0F0 0W0 0I0", "deadlock: rank 0 waits in 0W0 for 0I0"),
        ("0F0 0X0", "is not an action"),
        ("\n", "has no action"),
    ],
)
def test_an_unrunnable_order_says_why(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        parse_order(text)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"schedule": "fastest"}, "use one of 1f1b"),
        ({"num_microbatches": 0}, "must be a whole number"),
        ({"stage_rank": (0, 2)}, "each rank 0, 1"),
        ({"first_backward_stage": 3}, "must be in 0 .. 2"),
        ({"microbatches": [0, 0]}, "each of 0 .. 1 once"),
    ],
)
def test_bad_arguments(changed: dict, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make_order(**({"schedule": "1f1b", "stage_rank": (0, 1), "num_microbatches": 2} | changed))
