"""What is said of all layouts at once holds for each of their plans."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hf_dflop.plan.bound import Variant, layout_bounds
from hf_dflop.plan.candidates import (
    SEARCHED_SCHEDULES,
    checkpointing_variants,
    count_range,
    draft_plans,
    make_candidate,
    microbatch_counts,
)
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.compiled import compile_schedule
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.fit_memory import in_flight
from hf_dflop.plan.orders import stage_ranks
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.shortlist import Shortlist
from hf_dflop.plan.space import Layout, LayoutTable, layouts

from .planning import mixture, scorer_of, small_gpu, small_spec

CLUSTER = Cluster(nodes=2, gpus_per_node=4, gpu=small_gpu(0.7), inter_bytes_per_s=5e9, latency_s=2e-4)


def every_plan(scorer: Scorer, layout: Layout) -> list[Plan]:
    """All plans, whether they fit or not."""
    drafts = list(draft_plans(layout, len(scorer.workload.batches[0]), SEARCHED_SCHEDULES))
    made = [
        make_candidate(scorer.workload, layout, *draft, again)
        for draft, again in itertools.product(drafts, checkpointing_variants(scorer.workload))
    ]
    return [plan for plan in made if plan is not None]


def scorers() -> list[Scorer]:
    tied = small_spec(vocab=20_000)
    tied = replace(tied, llm=replace(tied.llm, tied_embeddings=True), class_tokens=1)
    return [
        scorer_of(CLUSTER, tied if seed else small_spec(llm_layers=7), mixture(seed), 16, frozen=frozen)
        for seed, frozen in enumerate(((), ("vision",), ("vision", "connector"), ("llm",)))
    ]


def test_a_layouts_bound_holds_for_all_its_plans_and_its_need_for_those_that_fit() -> None:
    checked = 0
    for number, scorer in enumerate(scorers()):
        table = LayoutTable.of(list(layouts(scorer.workload.spec, CLUSTER, 16))[number::23])
        shortlist = Shortlist(scorer, table, Constraints(), interleaved=True)
        for place in range(len(table)):
            plans = every_plan(scorer, table.layout(place))
            needs = [scorer.need(plan, composed=True) for plan in plans]
            assert shortlist.static_need[place] <= shortlist.need[place] <= min(needs)
            for plan, need in zip(plans, needs, strict=True):
                if need <= 1:
                    bounds = shortlist.of_count(np.array([place]), plan.num_microbatches)
                    variant = Variant(plan.vision.checkpointing, plan.llm.checkpointing, plan.llm.num_chunks)
                    own = bounds[shortlist.variants.index(variant), 0]
                    assert (shortlist.bounds[place] <= own).all()
                    assert (scorer.all_seconds(plan) >= own * (1 - 1e-9)).all(), plan
                    checked += 1
    assert checked > 100


def test_bounds_of_stock_microbatches_hold_and_are_higher() -> None:
    higher = checked = 0
    for number, scorer in enumerate(scorers()):
        table = LayoutTable.of(list(layouts(scorer.workload.spec, CLUSTER, 16))[number::61])
        of_stock = Shortlist(scorer, table, Constraints(), interleaved=True, balance=False)
        of_any = Shortlist(scorer, table, Constraints(), interleaved=True)
        for place in range(len(table)):
            for plan in every_plan(scorer, table.layout(place)):
                stock = replace(plan, balance=False)
                if scorer.need(stock, composed=True) > 1:
                    continue
                variant = Variant(plan.vision.checkpointing, plan.llm.checkpointing, plan.llm.num_chunks)
                row = of_any.variants.index(variant)
                own, any_ = (
                    one.of_count(np.array([place]), plan.num_microbatches)[row, 0] for one in (of_stock, of_any)
                )
                assert (own >= any_).all()
                assert (scorer.all_seconds(stock) >= own * (1 - 1e-9)).all(), stock
                higher += int((own > 1.05 * any_).all())
                checked += 1
    assert higher > checked / 10 > 5


def test_the_split_of_another_variant_bounds_too_high() -> None:
    """Why each variant has a bound of its own: layers are whole, and recomputation moves them."""
    spec = small_spec(vision_layers=4, llm_layers=12, vocab=30_000)
    scorer = scorer_of(CLUSTER, spec, mixture(1), 12, num_batches=4)
    layout = Layout("colocated", 4, 1, 1, 4, 2, 1, 1)
    plain = layout_bounds(scorer.workload, CLUSTER, [layout], Variant())
    again = layout_bounds(scorer.workload, CLUSTER, [layout], Variant(vision_checkpointing=True))
    assert (again < 0.95 * plain).any()
    shortlist = Shortlist(scorer, LayoutTable.of([layout]), Constraints(), interleaved=True)
    recomputing = next(p for p in every_plan(scorer, layout) if p.vision.checkpointing and not p.llm.checkpointing)
    assert (shortlist.bounds[0] <= scorer.all_seconds(recomputing)).all()


def test_no_schedule_has_fewer_microbatches_in_flight_than_1f1b() -> None:
    depths = [(0, 2), (0, 4), (1, 2), (2, 3), (3, 1)]
    for schedule, (v, llm), count in itertools.product(SEARCHED_SCHEDULES, depths, (1, 4, 12)):
        chunks = 2 if schedule == "interleaved" and llm > 1 else 1
        ranks = stage_ranks(llm, llm * chunks, num_vision_ranks=v, num_vision_stages=v, colocated=v == 0)
        formula = np.minimum(count, v + llm - np.array(ranks))
        flying = in_flight(compile_schedule(schedule, ranks, count))
        assert (flying >= formula).all()
        if schedule == "1f1b":
            assert (flying == formula).all()


def test_counts_of_all_layouts() -> None:
    found = list(layouts(small_spec(), CLUSTER, 24))
    fewest, most = count_range(LayoutTable.of(found), 24)
    for layout, low, high in zip(found, fewest, most, strict=True):
        counts = microbatch_counts(layout, 24)
        assert (low, high) == (counts[-1], counts[0])


def test_a_table_gives_its_layouts_back() -> None:
    found = list(layouts(small_spec(), CLUSTER, 24))
    table = LayoutTable.of(found)
    assert [table.layout(place) for place in range(len(table))] == found


@pytest.mark.parametrize(
    "text",
    ["vision.tp<=2", "vision.dp>1", "llm.pp==2", "llm.ranks>4", "no-ddp", "no-fsdp", "no-hsdp", "no-colocated",
     "no-disjoint", "no-tp"],
)  # fmt: skip
def test_constraints_on_all_layouts_are_those_on_plans(text: str) -> None:
    scorer = scorer_of(CLUSTER, small_spec(), mixture(0), 16)
    found = list(layouts(scorer.workload.spec, CLUSTER, 16))
    rules = Constraints([text])
    kept, ruled_out = rules.kept_by(LayoutTable.of(found))
    plans = [make_candidate(scorer.workload, layout, "1f1b", 1, 1, (False, False)) for layout in found]
    assert kept.tolist() == [plan is None or rules.rejects(plan) is None for plan in plans]
    assert 0 < ruled_out[text] == (~kept).sum() < len(found)


def test_a_large_cluster_gives_the_encoder_whole_nodes() -> None:
    spec = small_spec()
    sizes = {
        one.v_tp * one.v_pp * one.v_dp
        for one in layouts(spec, Cluster(nodes=64, gpus_per_node=8, gpu=small_gpu()), 4096)
        if one.placement == "disjoint"
    }
    assert all(size % 8 == 0 for size in sizes)
    smaller = sorted(size for size in sizes if size <= 256)
    assert smaller[0] == 8
    assert smaller[-1] == 256
    assert {512 - size for size in smaller} <= sizes
    assert all(after - before <= max(8, before / 16) for before, after in itertools.pairwise(smaller))
