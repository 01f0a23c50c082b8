"""The search finds what brute force over the whole space finds, and its bounds hold."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hf_dflop.plan import compose
from hf_dflop.plan.bound import Variant, layout_bounds
from hf_dflop.plan.candidates import make_candidate
from hf_dflop.plan.cluster import Cluster, NodeGroup
from hf_dflop.plan.compiled import compile_order, step_seconds
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.search import search
from hf_dflop.plan.space import Layout, layouts
from hf_dflop.plan.step import plan_step
from tests.distributed.every_case import EVERY_CASE

from .brute_force import plans_of
from .planning import mixture, scorer_of, small_gpu, small_spec

CASES = [
    # (nodes, GPUs per node, batch, memory GiB, vision layers, LLM layers, seed)
    *[(1, gpus, 12, 4.0, 4, 6, seed) for gpus in (1, 2, 3, 4, 5, 6, 8) for seed in (0, 1, 2)],
    *[(1, gpus, 16, memory, 3, 8, 3) for gpus in (2, 4, 6, 8) for memory in (0.4, 0.6, 1.0)],
    *[(nodes, 4, 16, 1.0, 4, 5, seed) for nodes in (2, 3, 4) for seed in (4, 5)],
    *[(nodes, 2, 10, 0.5, 2, 4, seed) for nodes in (2, 3, 5, 8) for seed in (6, 7)],
    *[(1, 16, 24, 0.8, 6, 4, seed) for seed in (8, 9, 10, 11)],
]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 50
    assert max(nodes * gpus for nodes, gpus, *_ in CASES) == 16


@pytest.mark.parametrize("chunk", range(8))
def test_the_search_finds_what_brute_force_finds(chunk: int) -> None:
    for nodes, gpus, batch, memory, vision_layers, llm_layers, seed in CASES[chunk::8]:
        cluster = Cluster(nodes=nodes, gpus_per_node=gpus, gpu=small_gpu(memory), inter_bytes_per_s=5e9)
        spec = small_spec(vision_layers=vision_layers, llm_layers=llm_layers)
        scorer = scorer_of(cluster, spec, mixture(seed), batch, num_batches=1)
        found = list(layouts(spec, cluster, batch))
        most = 60 if EVERY_CASE else 40
        if len(found) > most:  # every kind, all depths, but not all of a large space
            found = found[:12] + found[12 :: len(found) // (most - 20)]
        best = min((scorer.all_seconds(plan).mean() for lay in found for plan in plans_of(scorer, lay)), default=None)
        winner = search(scorer, found).winner
        assert (None if winner is None else winner.mean_s) == best


def test_it_does_where_batches_are_composed_in_parts(monkeypatch) -> None:
    monkeypatch.setattr(compose, "MAX_TOGETHER", 5)
    for nodes, gpus, batch, memory, vision_layers, llm_layers, seed in CASES[3::11]:
        cluster = Cluster(nodes=nodes, gpus_per_node=gpus, gpu=small_gpu(memory), inter_bytes_per_s=5e9)
        spec = small_spec(vision_layers=vision_layers, llm_layers=llm_layers)
        scorer = scorer_of(cluster, spec, mixture(seed), batch, num_batches=2)
        found = list(layouts(spec, cluster, batch))[::3]
        best = min((scorer.all_seconds(plan).mean() for lay in found for plan in plans_of(scorer, lay)), default=None)
        winner = search(scorer, found).winner
        assert (None if winner is None else winner.mean_s) == best


def test_no_plan_goes_below_the_bound_of_its_layout() -> None:
    cluster = Cluster(nodes=2, gpus_per_node=4, gpu=small_gpu(), inter_bytes_per_s=5e9)
    spec = small_spec()
    for frozen in ((), ("vision",), ("vision", "connector"), ("llm",)):
        scorer = scorer_of(cluster, spec, mixture(1), 16, frozen=frozen)
        found = list(layouts(spec, cluster, 16))[::5]
        tables = [layout_bounds(scorer.workload, cluster, found, Variant(num_chunks=n)) for n in (1, 2)]
        nearest = np.inf
        for place, layout in enumerate(found):
            for plan in plans_of(scorer, layout):
                bound = tables[plan.llm.num_chunks - 1][place]
                seconds = scorer.all_seconds(plan)
                assert (seconds >= bound * (1 - 1e-9)).all(), (layout, plan.schedule, seconds, bound)
                nearest = min(nearest, float((seconds / bound).min()))
        assert nearest < 1.3  # a bound of zero would hold too


def test_the_score_is_the_simulators() -> None:
    """Composition aside, a score is what `plan_step` and the simulator say of the same microbatches."""
    cluster = Cluster(nodes=2, gpus_per_node=4, gpu=small_gpu(), inter_bytes_per_s=5e9)
    spec = small_spec()
    scorer = scorer_of(cluster, spec, mixture(2), 16)
    for layout in itertools.islice(layouts(spec, cluster, 16), 0, None, 9):
        for plan in plans_of(scorer, layout)[:2]:
            stock = replace(plan, balance=False)
            step = plan_step(
                stock,
                scorer.workload.cost,
                scorer.workload.batches[0],
                communication=cluster.network,
                optimizer_s=scorer.optimizer_s(stock),
            )
            expected = step_seconds(compile_order(step.order), step.durations)
            assert scorer.seconds(stock, 0) == pytest.approx(expected, rel=1e-9)


def test_constraints_are_kept_and_counted() -> None:
    cluster = Cluster(nodes=1, gpus_per_node=4, gpu=small_gpu())
    spec = small_spec()
    scorer = scorer_of(cluster, spec, mixture(3), 16)
    found = list(layouts(spec, cluster, 16))
    result = search(scorer, found, constraints=Constraints(["no-ddp", "no-fsdp", "llm.pp>=2", "schedule==1f1b"]))
    assert result.winner is not None
    assert result.winner.plan.llm.pp >= 2
    assert result.winner.plan.schedule == "1f1b"
    assert result.rejected["no-ddp"] > 0


def test_more_memory_is_never_worse() -> None:
    spec = small_spec()
    times = []
    for memory in (0.35, 0.5, 1.0, 4.0):
        cluster = Cluster(nodes=1, gpus_per_node=4, gpu=small_gpu(memory))
        winner = search(scorer_of(cluster, spec, mixture(4), 16), list(layouts(spec, cluster, 16))).winner
        times.append(np.inf if winner is None else winner.mean_s)
    assert times == sorted(times, reverse=True)
    assert times[-1] < np.inf


def test_a_slow_gpu_slows_the_stage_that_it_runs() -> None:
    fast = small_gpu()
    slow = replace(fast, name="slow", peak_flops_per_s=fast.peak_flops_per_s / 2)
    spec = small_spec()
    groups = (NodeGroup(nodes=1, gpu=slow), NodeGroup(nodes=1, gpu=fast))
    mixed = scorer_of(Cluster(gpus_per_node=2, groups=groups), spec, mixture(5), 16)
    even = scorer_of(Cluster(nodes=2, gpus_per_node=2, gpu=fast), spec, mixture(5), 16)
    layout = Layout("disjoint", 1, 1, 2, 1, 1, 2, 1)  # the encoder on the slow node
    plan = make_candidate(mixed.workload, layout, "1f1b", 1, 4, (False, False))
    assert plan is not None
    slow_stages, stages = mixed.stages(plan, 0), even.stages(plan, 0)
    assert np.allclose(slow_stages.forward[0], 2 * stages.forward[0])
    assert np.allclose(slow_stages.forward[1], stages.forward[1])
