"""The planner's microbatches are the balancer's; large batches are composed in parts."""

import numpy as np
import pytest

from hf_dflop.balance import assign
from hf_dflop.balance.assign import assign_flat
from hf_dflop.plan import compose
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.stage_seconds import stock_flat
from hf_dflop.plan.step import stock_groups

from .planning import mixture, scorer_of, small_gpu, small_spec


@pytest.mark.parametrize("objective", ["step", "slot", "stage", "pipeline"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_flat_assignment_is_the_nested_one(objective: str, padded: bool) -> None:
    random = np.random.default_rng(5)
    vision, llm = random.exponential(1.0, 40), random.lognormal(0, 1, 40)
    stock = stock_groups(40, 3, 4)
    ways = {"num_ranks": 3, "num_slots": 4, "objective": objective, "padded": padded, "proposals": 400}
    nested = assign(vision, llm, baseline=stock, **ways).groups
    flat = assign_flat(vision, llm, stock_flat(40, 12), **ways)
    for rank, slots in enumerate(nested):
        for slot, group in enumerate(slots):
            assert (flat[group] == slot * 3 + rank).all()


def test_the_stock_grouping() -> None:
    flat = stock_flat(23, 6)
    for rank, slots in enumerate(stock_groups(23, 2, 3)):
        for slot, group in enumerate(slots):
            assert (flat[group] == slot * 2 + rank).all()


def test_parts_of_a_large_batch_are_alike(monkeypatch) -> None:
    scorer = scorer_of(Cluster(nodes=1, gpus_per_node=4, gpu=small_gpu()), small_spec(), mixture(0), 230)
    seconds = scorer.workload.seconds(False, False)[0]
    cost = seconds.vision + seconds.llm

    def largest() -> float:
        group = compose.Composer(scorer.workload)._groups(0, 7, 4, "joined", 1.0, True)
        assert (np.bincount(group, minlength=28) > 0).all()
        return float(np.bincount(group, cost).max()) / (cost.sum() / 28)

    whole = largest()
    monkeypatch.setattr(compose, "MAX_TOGETHER", 64)  # four parts, of 1 and 2 replicas
    assert largest() < whole + 0.05


def test_parts_with_as_many_microbatches_as_samples(monkeypatch) -> None:
    monkeypatch.setattr(compose, "MAX_TOGETHER", 5)
    scorer = scorer_of(Cluster(nodes=1, gpus_per_node=4, gpu=small_gpu()), small_spec(), mixture(0), 21)
    group = compose.Composer(scorer.workload)._groups(0, 5, 4, "pipeline", 2.0, True)
    assert (np.bincount(group, minlength=20) > 0).all()


def test_what_is_remembered_is_limited(monkeypatch) -> None:
    monkeypatch.setattr(compose, "KEPT_BYTES", 100)
    made = []

    def make(number: int) -> np.ndarray:
        made.append(number)
        return np.zeros(5)  # 40 bytes

    kept = compose._Remembered(make, lambda array: array.nbytes)
    for number in (1, 2, 1, 3, 1, 2):
        kept(number)
    assert made == [1, 2, 3, 2]  # 3 pushed 2 out, which was longest ago
