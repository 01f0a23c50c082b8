"""From config, data and cluster to a plan in words and JSON; what cannot be planned says why."""

import json
import re

import numpy as np
import pytest

import hf_dflop
from hf_dflop.errors import PlanError
from hf_dflop.plan.cluster import GPUS, Cluster, Gpu, NodeGroup
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.make_plan import make_plan
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.split import split_layers
from hf_dflop.plan.what_if import what_if

from .planning import NO_RESERVE, mixture, small_gpu, small_spec

SPEC = small_spec()
CLUSTER = Cluster(nodes=1, gpus_per_node=4, gpu=small_gpu(), price_per_gpu_hour=2.0)


def test_a_planning_tells_and_saves(tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    planning = make_plan(
        SPEC, mixture(0), CLUSTER, global_batch_size=16, memory=NO_RESERVE, progress=lambda *at: seen.append(at)
    )
    planning.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").llm == planning.plan.llm
    assert planning.plan.num_ranks == 4
    assert planning.plan.expected["step_s"] == planning.score.mean_s
    assert planning.score.low_s <= planning.score.mean_s <= planning.score.high_s
    text = planning.explain()
    assert "samples a step" in text
    assert "GPU-hours" in text
    assert "at 2 per GPU-hour" in text
    assert json.loads(json.dumps(planning.to_dict()))["num_layouts"] == planning.result.num_layouts
    assert seen[-1] == (planning.result.num_layouts, planning.result.num_layouts)


def test_one_gpu_has_one_layout() -> None:
    planning = make_plan(
        SPEC, mixture(0), Cluster(nodes=1, gpus_per_node=1, gpu=small_gpu()), global_batch_size=8, memory=NO_RESERVE
    )
    assert planning.result.num_layouts == 1
    assert planning.plan.num_ranks == 1


def test_what_if_says_what_a_change_would_buy() -> None:
    planning = make_plan(SPEC, mixture(0), CLUSTER, global_batch_size=16, memory=NO_RESERVE)
    found = {change.name: change for change in what_if(planning)}
    assert found["one node more"].samples_per_s > 16 / planning.score.mean_s
    assert found["encoder frozen"].samples_per_s > 16 / planning.score.mean_s


def test_nothing_fits_and_says_what_would() -> None:
    tiny = Cluster(nodes=1, gpus_per_node=1, gpu=small_gpu(0.25))
    with pytest.raises(PlanError, match=r"The nearest needs .* GiB of 0\.2 GiB") as error:
        make_plan(SPEC, mixture(0), tiny, global_batch_size=8, memory=NO_RESERVE)
    nodes = int(re.search(r"would fit: (\d+) nodes instead of 1 \(", str(error.value))[1])
    for number, fits in ((nodes, True), (nodes // 2, False)):  # what is said to fit does, and half of it does not
        cluster = Cluster(nodes=number, gpus_per_node=1, gpu=small_gpu(0.25))
        if fits:
            make_plan(SPEC, mixture(0), cluster, global_batch_size=8, memory=NO_RESERVE)
        else:
            with pytest.raises(PlanError, match="no plan"):
                make_plan(SPEC, mixture(0), cluster, global_batch_size=8, memory=NO_RESERVE)


def test_constraints_that_leave_nothing() -> None:
    with pytest.raises(PlanError, match="Without the constraints"):
        make_plan(SPEC, mixture(0), CLUSTER, global_batch_size=16, constraints=["llm.tp>64"], memory=NO_RESERVE)


@pytest.mark.parametrize("text", ["vision.tp", "vision.xx<=2", "llm.tp<=two", "no-thing", "schedule==fifo"])
def test_a_constraint_that_is_none(text: str) -> None:
    with pytest.raises(PlanError, match="is not a constraint"):
        Constraints([text])


def test_no_samples_and_no_batch() -> None:
    with pytest.raises(PlanError, match="no samples"):
        make_plan(SPEC, mixture(0).select(np.array([], dtype=int)), CLUSTER, global_batch_size=4)
    with pytest.raises(PlanError, match="must be at least 1"):
        make_plan(SPEC, mixture(0), CLUSTER, global_batch_size=0)


def test_a_profile_of_another_model() -> None:
    profile = hf_dflop.DatasetProfile.from_shapes(mixture(0), spec=small_spec(llm_layers=9))
    with pytest.raises(PlanError, match="another model"):
        make_plan(SPEC, profile, CLUSTER, global_batch_size=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inter_bytes_per_s": 0.0}, "bandwidth must be positive"),
        ({"gpu": "H1000"}, "no GPU preset"),
        ({"nodes": 0}, "nodes is 0"),
        ({"gpus_per_node": 2.5}, "gpus_per_node is 2.5"),
        ({"price_per_gpu_hour": -1.0}, "price_per_gpu_hour"),
    ],
)
def test_clusters_that_cannot_be(fields, message) -> None:
    with pytest.raises(PlanError, match=message):
        Cluster(**fields)


def test_clusters_there_and_back() -> None:
    mixed = Cluster(
        gpus_per_node=8,
        groups=(NodeGroup(nodes=1, gpu=GPUS["A100-80GB"]), NodeGroup(nodes=2, gpu=GPUS["H100-80GB"])),
    )
    assert Cluster.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    assert (mixed.num_gpus, mixed.gpu_of(7).name, mixed.gpu_of(8).name) == (24, "A100-80GB", "H100-80GB")
    assert mixed.slowdown()[0] == pytest.approx(989 / 312)
    assert mixed.slowdown()[23] == 1.0
    with pytest.raises(PlanError, match="beyond the 24 GPUs"):
        mixed.gpu_of(24)
    with pytest.raises(PlanError, match="must be positive"):
        Gpu(name="x", memory_bytes=1, peak_flops_per_s=0, memory_bytes_per_s=1, link_bytes_per_s=1)


def test_split_layers_is_optimal() -> None:
    """Against every split, on small cases."""
    import itertools

    for layers, stages, first, last in itertools.product(range(2, 8), (2, 3), (0.0, 1.5), (0.0, 0.7, 2.0)):
        if layers < stages:
            continue

        def work(split, first=first, last=last):
            extra = [first, *[0.0] * (len(split) - 2), last]
            return max(a + b for a, b in zip(split, extra, strict=True))

        every = [split for split in itertools.product(range(1, layers + 1), repeat=stages) if sum(split) == layers]
        found = split_layers(layers, stages, first_extra=first, last_extra=last)
        assert sum(found) == layers
        assert work(found) == pytest.approx(min(map(work, every)))
    with pytest.raises(PlanError, match="cannot fill"):
        split_layers(2, 3)
