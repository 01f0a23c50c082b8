"""Where ranks stand, which encoder replica encodes what, and where its rows go."""

import numpy as np
import pytest

from hf_dflop.errors import PlanError, ShapeMismatchError
from hf_dflop.pipeline.bridge import route_step
from hf_dflop.pipeline.shape import MicrobatchShape, StepShape
from hf_dflop.pipeline.topology import Topology
from hf_dflop.plan import ModulePlan, Plan


def step(*microbatches: list[list[int]]) -> StepShape:
    return StepShape(
        microbatches=tuple(
            tuple(MicrobatchShape.of([n + 3 for n in samples], samples) for samples in replicas)
            for replicas in microbatches
        ),
        label_tokens=1,
    )


def test_rows_are_cut_by_hand() -> None:
    # 4 + 4 + 8 rows over two encoders: the first two samples, then the third; text alone is not sent
    route = route_step(step([[4, 0, 4], [8]]), 2)[0]
    assert route.samples == (((0, 0), (0, 2)), ((1, 0),))
    assert [(p.encoder, p.llm, p.source, p.target, p.rows) for p in route.pieces] == [(0, 0, 0, 0, 8), (1, 1, 0, 0, 8)]
    assert route.encoder_rows == (8, 8)


@pytest.mark.parametrize("num_encoders", [1, 2, 3, 5])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_every_row_arrives_once_and_in_order(num_encoders: int, num_replicas: int) -> None:
    generator = np.random.default_rng(num_encoders * 10 + num_replicas)
    for _ in range(50):
        sizes = [
            (generator.integers(0, 9, generator.integers(0, 5)) * generator.integers(0, 2)).tolist()
            for _ in range(num_replicas)
        ]
        (route,) = route_step(step(sizes), num_encoders)
        names = {(d, i): [(d, i, r) for r in range(n)] for d, s in enumerate(sizes) for i, n in enumerate(s)}
        encoded = [[row for sample in samples for row in names[sample]] for samples in route.samples]
        assert tuple(map(len, encoded)) == route.encoder_rows
        arrived: list[list] = [[None] * sum(s) for s in sizes]
        for piece in route.pieces:
            rows = encoded[piece.encoder][piece.source : piece.source + piece.rows]
            arrived[piece.llm][piece.target : piece.target + piece.rows] = rows
        assert arrived == [[row for i in range(len(s)) for row in names[d, i]] for d, s in enumerate(sizes)]
        assert [(p.encoder, p.llm) for p in route.pieces] == sorted({(p.encoder, p.llm) for p in route.pieces})


def test_colocated_encoders_serve_their_own_rank() -> None:
    route = route_step(step([[9], [1], []]), 3, colocated=True)[0]
    assert route.samples == (((0, 0),), ((1, 0),), ())


def test_shapes_of_padded_packed_and_empty_microbatches() -> None:
    assert MicrobatchShape.of([5, 9], [1, 0], pad_to_multiple_of=8).length == 16
    assert MicrobatchShape.of([5, 9], [1, 0], packed=True).num_tokens == 14
    assert MicrobatchShape.of([], []) == MicrobatchShape()
    with pytest.raises(ShapeMismatchError, match="one shape per replica"):
        StepShape(microbatches=((MicrobatchShape(),), ()), label_tokens=1)


def test_ranks_of_a_plan() -> None:
    plan = Plan(
        vision=ModulePlan(layers=(2,), dp=3),
        llm=ModulePlan(layers=(1, 1, 1, 1), dp=2, num_chunks=2),
        num_microbatches=4,
    )
    topology = Topology(plan=plan)
    assert topology.stage_columns == (0, 1, 2, 1, 2)
    places = [topology.place(rank) for rank in range(plan.num_ranks)]
    assert [place.replica for place in places] == [0, 1, 2, 0, 1, 0, 1]
    assert [place.stages for place in places] == [(0,)] * 3 + [(1, 3)] * 2 + [(2, 4)] * 2
    for place in places:
        assert all(topology.rank(stage, place.replica) == place.rank for stage in place.stages)
    assert topology.copies() == [(0, 1, 2), (3, 4), (5, 6)]
    with pytest.raises(PlanError, match="not one of the plan's 7 ranks"):
        topology.place(7)


def test_an_encoder_in_stages_comes_first() -> None:
    plan = Plan(vision=ModulePlan(layers=(3, 2), dp=2), llm=ModulePlan(layers=(1, 1)), num_microbatches=2)
    topology = Topology(plan=plan)
    assert topology.stage_columns == (0, 1, 2, 3)
    places = [topology.place(rank) for rank in range(plan.num_ranks)]
    assert [place.stages for place in places] == [(0,), (0,), (1,), (1,), (2,), (3,)]
    assert [place.encodes for place in places] == [True] * 4 + [False] * 2
    assert [place.is_llm for place in places] == [False] * 4 + [True] * 2
    assert topology.copies() == [(0, 1), (2, 3), (4,), (5,)]


def test_tensor_parallel_ranks_are_neighbours_and_serve_each_other_in_turn() -> None:
    plan = Plan(vision=ModulePlan(layers=(2,), dp=2, tp=2), llm=ModulePlan(layers=(1, 1), tp=4), num_microbatches=2)
    topology = Topology(plan=plan)
    places = [topology.place(rank) for rank in range(plan.num_ranks)]
    assert [place.shard for place in places] == [0, 1, 0, 1] + [0, 1, 2, 3] * 2
    assert topology.tensor_groups() == [(0, 1), (2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert topology.copies() == [(0, 2), (1, 3), *((rank,) for rank in range(4, 12))]
    for edge in ((0, 1), (1, 0), (1, 2), (2, 1)):  # every receiver is sent to once, by the one it waits for
        here, there = edge
        sent = {
            (topology.rank(here, 0, shard), rank)
            for shard in range(topology.num_shards(here))
            for rank in topology.receivers(there, 0, shard, topology.num_shards(here))
        }
        waited = {
            (topology.sender(here, 0, shard), topology.rank(there, 0, shard))
            for shard in range(topology.num_shards(there))
        }
        assert sent == waited
        assert len(sent) == topology.num_shards(there)


def test_an_encoder_that_is_not_split_runs_on_each_of_the_llms_ranks() -> None:
    plan = Plan(
        placement="colocated",
        vision=ModulePlan(layers=(2,), dp=2),
        llm=ModulePlan(layers=(1, 1), dp=2, tp=2),
        num_microbatches=2,
    )
    topology = Topology(plan=plan)
    assert [topology.place(rank).stages for rank in range(8)] == [(0, 1)] * 4 + [(2,)] * 4
    assert topology.tensor_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert topology.copies() == [(0, 2), (1, 3), (4, 6), (5, 7)]


def test_a_colocated_encoder_is_a_stage_of_its_own_on_the_first_column() -> None:
    plan = Plan(
        placement="colocated",
        vision=ModulePlan(layers=(2,), dp=2),
        llm=ModulePlan(layers=(1, 1), dp=2),
        num_microbatches=2,
    )
    topology = Topology(plan=plan)
    assert topology.stage_columns == (0, 0, 1)
    assert [topology.place(rank).stages for rank in range(4)] == [(0, 1), (0, 1), (2,), (2,)]


@pytest.mark.parametrize(
    ("module", "settings", "reason"),
    [
        ({"vision": ModulePlan(layers=(1, 1), num_chunks=2)}, {}, "an encoder rank runs one stage"),
        (
            {"vision": ModulePlan(layers=(1,), tp=2), "llm": ModulePlan(layers=(1,), tp=4)},
            {"placement": "colocated"},
            "vision.tp is 2 on the LLM's ranks, whose tp is 4",
        ),
        ({}, {"cached_features": True, "frozen": ("vision",)}, "cached_features"),
    ],
)
def test_what_is_not_run_is_refused(module: dict, settings: dict, reason: str) -> None:
    modules = {"vision": ModulePlan(layers=(1,)), "llm": ModulePlan(layers=(1, 1))} | module
    with pytest.raises(PlanError, match=reason):
        Topology(plan=Plan(**modules, num_microbatches=2, **settings))
