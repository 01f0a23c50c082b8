"""The plan record: ranks by hand, JSON there and back, contradictions refused."""

import json

import pytest

from hf_dflop.errors import PlanError
from hf_dflop.plan import Action, Kind, ModulePlan, Plan

DISJOINT = Plan(
    vision=ModulePlan(layers=(6,), dp=2),
    llm=ModulePlan(layers=(3, 2), dp=2, tp=2),
    num_microbatches=4,
    global_batch_size=64,
    expected={"step_s": 1.5},
)


def test_ranks_of_disjoint_modules():
    # 2 vision ranks, then 2 stages x 2 replicas x 2 shards
    assert DISJOINT.num_ranks == 10
    assert DISJOINT.vision_ranks == (0, 1)
    assert DISJOINT.llm_ranks == tuple(range(2, 10))
    assert DISJOINT.llm.rank(stage=1, replica=0, shard=1) == 5
    assert DISJOINT.llm.rank(stage=0, replica=1, shard=0) == 2


def test_ranks_of_colocated_modules_and_chunks():
    plan = Plan(
        placement="colocated",
        vision=ModulePlan(layers=(6,), dp=2),
        llm=ModulePlan(layers=(1, 1, 1, 2), num_chunks=2, dp=2),
        num_microbatches=4,
    )
    assert (plan.llm.pp, plan.llm.num_stages, plan.num_ranks) == (2, 4, 4)
    assert plan.vision_ranks == (0, 1)
    assert plan.llm.rank(stage=2, replica=1) == 1  # stage 2 lies with stage 0


def test_json_there_and_back(tmp_path):
    DISJOINT.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == DISJOINT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"placement": "nowhere"}, "use one of"),
        ({"schedule": "fifo"}, "use one of"),
        ({"num_microbatches": 0}, "at least one"),
        ({"num_microbatches": 40}, "fewer samples than"),
        ({"frozen": ["tower"]}, "the modules are"),
        ({"fsdp_shards": 2}, "replicated"),
        ({"cached_features": True}, "frozen encoder"),
        ({"placement": "colocated", "vision": {"layers": [3, 3], "dp": 2}}, "one stage"),
        ({"llm": {"layers": [3, 2, 1], "num_chunks": 2, "dp": 2}}, "do not divide"),
        ({"llm": {"layers": [], "dp": 2}}, "must list the layers"),
        ({"llm": {"layers": [3], "tp": 0}}, "tp is 0"),
        ({"colour": "red"}, "not readable"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(DISJOINT.to_dict() | change))


def test_not_json():
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json("{")


def test_actions_print_and_parse():
    action = Action(12, Kind.BACKWARD_INPUT, 3)
    assert str(action) == "12I3"
    assert Action.parse("12I3") == action
    for bad in ("F0", "1X2", "1F", ""):
        with pytest.raises(PlanError, match="not an action"):
            Action.parse(bad)
