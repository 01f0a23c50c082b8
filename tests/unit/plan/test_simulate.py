"""The simulator against closed forms, bounds, and itself: with records and compiled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dflop.errors import PlanError
from hf_dflop.plan import (
    CAUSES,
    Durations,
    Kind,
    batch_seconds,
    compile_order,
    compile_schedule,
    make_order,
    simulate_order,
    stage_ranks,
    step_seconds,
)
from hf_dflop.plan.check_order import needs

LAYOUTS = ((0, 1), (0, 1, 2), (0, 0, 1), (0, 1, 0, 1), (0, 1, 2, 1, 2))
SCHEDULES = ("1f1b", "interleaved", "zero-bubble", "data-aware", "gpipe")


def _equal(num_stages: int, num_microbatches: int, forward: float, backward: float, **others) -> Durations:
    ones = np.ones((num_stages, num_microbatches))
    return Durations.of(forward * ones, backward * ones, **others)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (2, 8), (4, 4), (4, 8), (8, 32)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_bubble_of_1f1b(schedule: str, p: int, m: int) -> None:
    order = make_order(schedule, stage_rank=range(p), num_microbatches=m)
    timeline = simulate_order(order, _equal(p, m, 1.0, 2.0))
    assert timeline.step_s == 3.0 * (m + p - 1)
    assert timeline.idle_fraction == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.idle_s["fill_drain"] == pytest.approx(np.full(p, 3.0 * (p - 1)))
    assert timeline.idle_s["imbalance"] == pytest.approx(np.zeros(p))
    in_flight = [m] * p if schedule == "gpipe" else [min(m, p - s) for s in range(p)]
    assert timeline.peak_in_flight.tolist() == in_flight


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 8), (8, 16)])
@pytest.mark.parametrize("v", [2, 3])
def test_bubble_of_interleaved(p: int, m: int, v: int) -> None:
    order = make_order("interleaved", stage_rank=stage_ranks(p, p * v), num_microbatches=m)
    timeline = simulate_order(order, _equal(p * v, m, 1.0, 2.0))
    assert timeline.step_s == 3.0 * (v * m + p - 1)
    assert timeline.idle_fraction == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 8), (8, 32)])
def test_bubble_of_zero_bubble(p: int, m: int) -> None:
    """ZB-H1 with equal F, I and W: (p - 1)(F + I - W), a third of 1F1B's."""
    order = make_order("zero-bubble", stage_rank=range(p), num_microbatches=m)
    timeline = simulate_order(order, _equal(p, m, 1.0, 2.0, weight_share=0.5))
    assert timeline.step_s == 3.0 * m + (p - 1)
    assert timeline.peak_in_flight.tolist()[0] <= p


def test_transfers_cost_latency_on_the_way_in_and_out() -> None:
    order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=1)
    delays = {"transfer_s": [[0.5]], "gradient_transfer_s": [[0.25]]}
    timeline = simulate_order(order, _equal(2, 1, 1.0, 2.0, **delays))
    assert timeline.step_s == 6.75
    assert timeline.idle_s["communication"].tolist() == [0.75, 0.75]
    assert timeline.idle_s["fill_drain"].tolist() == [3.0, 3.0]


def test_transfers_of_one_sender_queue() -> None:
    order = make_order("gpipe", stage_rank=(0, 1), num_microbatches=3, first_backward_stage=2)
    durations = Durations.of([[1.0] * 3, [0.1] * 3], np.zeros((2, 3)), transfer_s=[[5.0] * 3])
    assert simulate_order(order, durations).step_s == pytest.approx(1 + 3 * 5 + 0.1)


def test_reduction_hides_behind_the_last_backward_but_for_its_tail() -> None:
    order = make_order("1f1b", stage_rank=(0,), num_microbatches=2)
    seconds = {"forward_s": [[[1.0, 1.0], [1.0, 2.0]]], "backward_s": [[[2.0, 2.0], [2.0, 2.0]]]}

    def step_s(**others: float) -> float:
        return simulate_order(order, Durations.of(**seconds, **others)).step_s

    assert step_s() == 7.0
    assert step_s(reduce_s=3.0) == 10.0  # nothing hidden
    assert step_s(reduce_s=3.0, reduce_tail_s=0.5) == 8.0  # 2 s hidden
    assert step_s(reduce_s=1.5, reduce_tail_s=0.5, optimizer_s=0.25) == 7.75


def test_data_that_comes_late_is_waited_for() -> None:
    order = make_order("1f1b", stage_rank=(0,), num_microbatches=2, microbatches=[1, 0])
    timeline = simulate_order(order, _equal(1, 2, 1.0, 1.0, data_ready_s=[[1.0, 2.0]]))
    assert timeline.step_s == 5.0
    assert timeline.idle_s["data"].tolist() == [1.0]


def test_lockstep_waits_for_the_slowest_in_every_action() -> None:
    """FSDP: two ranks, encoder and LLM each take the slower of the two."""
    order = make_order("1f1b", stage_rank=(0, 0), num_microbatches=1)
    forward = [[[1.0], [3.0]], [[4.0], [1.0]]]
    timeline = simulate_order(order, Durations.of(forward, np.zeros((2, 2, 1)), lockstep=2))
    assert timeline.step_s == 7.0
    assert timeline.busy_s.tolist() == [5.0, 4.0]
    assert timeline.idle_s["imbalance"].tolist() == [2.0, 3.0]


def test_an_encoder_feeds_several_replicas() -> None:
    """One encoder, two LLM replicas: both wait for it, and it waits for the slower one's gradient."""
    order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=1)
    timeline = simulate_order(order, Durations.of([[[1.0]], [[2.0], [5.0]]], [[[1.0]], [[2.0], [5.0]]]))
    assert timeline.step_s == 12.0
    # two encoders, one LLM replica: it waits for the slower
    timeline = simulate_order(order, Durations.of([[[1.0], [3.0]], [[2.0]]], [[[1.0], [3.0]], [[2.0]]]))
    assert timeline.step_s == 10.0
    # two encoders, three replicas, the images all with the last: nobody feeds the others
    shares = [[0.0], [0.0], [1.0]]
    durations = Durations.of(
        [[[9.0], [9.0]], [[1.0], [1.0], [1.0]]], [[[0.0], [0.0]], [[1.0], [1.0], [1.0]]], bridge_shares=shares
    )
    ends = {t.replica: t.end_s for t in simulate_order(order, durations).actions if str(t.action) == "1B0"}
    assert ends == {0: 2.0, 1: 2.0, 2: 11.0}


def test_bytes_in_flight() -> None:
    order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=3)
    timeline = simulate_order(order, _equal(2, 3, 1, 1), activation_bytes=[[[5, 7, 11]], 2.0])
    assert timeline.peak_bytes is not None
    assert timeline.peak_bytes.tolist() == [18.0, 2.0]  # 0F0 0F1 0B0 0F2: microbatches 1 and 2


@st.composite
def steps(draw: st.DrawFn):
    stage_rank = draw(st.sampled_from(LAYOUTS))
    schedule = draw(st.sampled_from(SCHEDULES))
    num_microbatches = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    llm = draw(st.integers(1, 3))
    vision = llm if stage_rank[0] == stage_rank[1] or 0 in stage_rank[1:] else draw(st.integers(1, 3))
    replicas = [vision] + [llm] * (len(stage_rank) - 1)
    lockstep = llm if vision == llm and draw(st.booleans()) else 1

    def rows(counts, scale):
        return [scale * rng.random((count, num_microbatches)) for count in counts]

    given = {
        "forward_s": rows(replicas, 1.0),
        "backward_s": rows(replicas, 2.0),
        "transfer_s": rows(replicas[:-1], 0.3),
        "gradient_transfer_s": rows(replicas[1:], 0.3),
        "data_ready_s": rng.random((vision, num_microbatches)),
        "reduce_s": 0.5,
        "reduce_tail_s": 0.1,
        "optimizer_s": 0.2,
        "floor_forward_s": 0.1,
        "lockstep": lockstep,
    }
    if vision != llm:
        given["bridge_shares"] = rng.random((llm, num_microbatches)) * (rng.random((llm, num_microbatches)) > 0.2)
    order = make_order(
        schedule,
        stage_rank=stage_rank,
        num_microbatches=num_microbatches,
        first_backward_stage=draw(st.sampled_from([0, 0, 1])),
        microbatches=rng.permutation(num_microbatches),
    )
    return order, given


@settings(max_examples=120, deadline=None)
@given(steps())
def test_both_simulators_agree_and_idle_adds_up(step) -> None:
    order, given = step
    durations = Durations.of(**given)
    timeline = simulate_order(order, durations)
    assert step_seconds(compile_order(order), durations) == pytest.approx(timeline.step_s, rel=1e-12)
    again = simulate_order(order, durations)
    assert (again.step_s, again.actions) == (timeline.step_s, timeline.actions)
    idle = sum(timeline.idle_s[cause] for cause in CAUSES)
    assert idle == pytest.approx(timeline.step_s - timeline.busy_s, abs=1e-9)
    assert all((timeline.idle_s[cause] >= 0).all() for cause in CAUSES)


@settings(max_examples=60, deadline=None)
@given(steps())
def test_never_faster_than_the_busiest_rank_or_the_longest_chain(step) -> None:
    order, given = step
    durations = Durations.of(**given)
    timeline = simulate_order(order, durations)
    assert timeline.step_s >= timeline.busy_s.max() - 1e-9
    # the longest chain of one microbatch of one replica through the LLM's stages
    kinds = {(a.stage, a.kind) for rank in order for a in rank}
    for microbatch in range(durations.num_microbatches):
        for replica in range(int(durations.num_replicas[-1])):
            chain = sum(
                durations.seconds[list(Kind).index(kind), stage, replica, microbatch]
                for stage, kind in kinds
                if stage > 0 and kind is not Kind.BACKWARD_WEIGHT
            )
            assert timeline.step_s >= chain - 1e-9
    # nothing starts before what it needs, and no rank does two things at once
    ends = {(t.action, t.replica): t.end_s for t in timeline.actions}
    last: dict[tuple[int, int], float] = {}
    split = any(a.kind is Kind.BACKWARD_INPUT for rank in order for a in rank)
    for timed in timeline.actions:
        assert timed.start_s >= last.get((timed.rank, timed.replica), 0.0)
        last[timed.rank, timed.replica] = timed.end_s
        for need in needs(timed.action, durations.num_stages, split):
            if need.stage and timed.action.stage:
                assert timed.start_s >= ends[need, timed.replica]


@settings(max_examples=60, deadline=None)
@given(steps(), st.sampled_from(["forward_s", "backward_s", "transfer_s", "gradient_transfer_s"]), st.data())
def test_more_seconds_are_never_quicker(step, name, data) -> None:
    order, given = step
    compiled = compile_order(order)
    before = step_seconds(compiled, Durations.of(**(given | {"reduce_s": 0.0})))
    rows = [row.copy() for row in given[name]]
    stage = data.draw(st.integers(0, len(rows) - 1))
    rows[stage][data.draw(st.integers(0, rows[stage].shape[0] - 1)), -1] += 1.0
    after = step_seconds(compiled, Durations.of(**(given | {"reduce_s": 0.0, name: rows})))
    assert after >= before - 1e-12


def test_many_steps_at_once() -> None:
    rng = np.random.default_rng(0)
    compiled = compile_schedule("1f1b", (0, 1, 2), 5)
    draws = [Durations.of(rng.random((3, 5)), rng.random((3, 5)), reduce_s=0.1) for _ in range(4)]
    many = batch_seconds(compiled, draws[0], np.stack([draw.seconds for draw in draws]))
    assert many.tolist() == [step_seconds(compiled, draw) for draw in draws]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"forward_s": [[1.0, np.nan]]}, "finite and >= 0"),
        ({"forward_s": [[1.0, np.inf]]}, "no bandwidth is 0"),
        ({"backward_s": [[1.0, -1.0]]}, r"backward_s\[0\] holds"),
        ({"backward_s": [[1.0]]}, "must be alike"),
        ({"forward_s": [], "backward_s": []}, "must be alike"),
        ({"weight_share": 1.5}, r"must lie in \[0, 1\]"),
        ({"lockstep": 2}, "must divide"),
        ({"transfer_s": [[1.0, 1.0]]}, "the senders' are"),
        ({"reduce_s": -1.0}, "reduce_s"),
    ],
)
def test_bad_durations(given: dict, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Durations.of(**({"forward_s": [[1.0, 1.0]], "backward_s": [[1.0, 1.0]]} | given))


def test_durations_of_another_plan() -> None:
    order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=2)
    with pytest.raises(PlanError, match="the order has 2 stages and 2 microbatches, the durations 3 and 2"):
        simulate_order(order, _equal(3, 2, 1, 1))
    with pytest.raises(PlanError, match=r"reduce_s has the shape \(3,\)"):
        simulate_order(order, _equal(2, 2, 1, 1, reduce_s=[1.0, 1.0, 1.0]))
    colocated = make_order("1f1b", stage_rank=(0, 0), num_microbatches=2)
    with pytest.raises(PlanError, match=r"rank 0 have \[1, 2\] replicas"):
        simulate_order(colocated, Durations.of([np.ones((1, 2)), np.ones((2, 2))], [np.ones((1, 2)), np.ones((2, 2))]))
