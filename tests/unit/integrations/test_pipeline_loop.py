"""What `hf_dflop.prepare` does to an optimizer of the whole model, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hf_dflop
from hf_dflop.errors import TrainerError
from hf_dflop.integrations.pipeline_checks import check_accelerator
from hf_dflop.integrations.pipeline_optimizer import check_by_number, keep_share, names_of
from hf_dflop.plan import ModulePlan, Plan


def whole() -> nn.Module:
    model = nn.Module()
    model.encoder, model.layer, model.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    model.head.weight = model.encoder.weight  # tied
    return model


def share(model: nn.Module) -> nn.Module:
    """What a rank of the last stage holds: the copy of the tied weight has the head's name alone."""
    own = nn.Module()
    own.layer, own.head = model.layer, model.head
    own.share = lambda name, value: value
    return own


def test_groups_options_state_and_schedulers_stay_with_the_parameters_of_the_rank() -> None:
    model = whole()
    groups = [
        {"params": [("layer.bias", model.layer.bias), ("encoder.bias", model.encoder.bias)], "weight_decay": 0.0},
        {"params": [("encoder.weight", model.encoder.weight), ("layer.weight", model.layer.weight)]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = optimizer.state[model.layer.weight]["exp_avg"].clone()
    kept: Any = keep_share(optimizer, names_of(model), share(model))
    assert kept is optimizer
    assert [group["weight_decay"] for group in kept.param_groups] == [0.0, 0.1]
    assert [group["param_names"] for group in kept.param_groups] == [
        ["layer.bias"],
        ["encoder.weight", "layer.weight"],
    ]
    assert [len(group["params"]) for group in kept.param_groups] == [1, 2]
    assert set(kept.state) == {model.layer.bias, model.head.weight, model.layer.weight}
    assert torch.equal(kept.state[model.layer.weight]["exp_avg"], moments)
    kept.step()
    scheduler.step()
    assert kept.param_groups[1]["lr"] == 0.25


def test_a_group_without_parameters_of_the_rank_stays_empty() -> None:
    model = whole()
    optimizer = torch.optim.AdamW([{"params": [model.encoder.bias]}, {"params": [model.layer.weight]}])
    kept = keep_share(optimizer, names_of(model), share(model))
    assert [len(group["params"]) for group in kept.param_groups] == [0, 1]
    kept.step()


def test_a_class_or_function_gets_the_parameters_of_the_rank() -> None:
    model = whole()
    kept = keep_share(lambda parameters: torch.optim.SGD(parameters, lr=1.0), names_of(model), share(model))
    assert len(kept.param_groups[0]["params"]) == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "looks at several"),
        (lambda model: torch.optim.LBFGS, "looks at several"),
        (lambda model: torch.optim.AdamW(whole().parameters()), "is not one of the model's"),
        (lambda model: SimpleNamespace(), "give a torch optimizer"),
        (lambda model: lambda parameters: None, "not a torch optimizer"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(make: Any, says: str) -> None:
    model = whole()
    with pytest.raises(TrainerError, match=says):
        keep_share(make(model), names_of(model), share(model))


def test_a_wrapped_optimizer_is_refused() -> None:
    from accelerate import Accelerator

    model = whole()
    wrapped = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TrainerError, match="wrapped already"):
        keep_share(wrapped, names_of(model), share(model))


def accelerator(**settings: Any) -> Any:
    like = {
        "distributed_type": "MULTI_CPU",
        "mixed_precision": "no",
        "gradient_state": SimpleNamespace(sync_with_dataloader=True),
        "gradient_accumulation_steps": 1,
    }
    return SimpleNamespace(**(like | settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distributed_type": "FSDP"}, "the plan lays out the model"),
        ({"mixed_precision": "fp8"}, "use bf16, fp16 or no"),
        ({"gradient_state": SimpleNamespace(sync_with_dataloader=False)}, "sync_with_dataloader"),
    ],
)
def test_accelerators_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, settings: Any, says: str) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    check_accelerator(accelerator())
    with pytest.raises(TrainerError, match=says):
        check_accelerator(accelerator(**settings))


def test_one_process_is_told_to_launch_more() -> None:
    with pytest.raises(TrainerError, match="accelerate launch"):
        check_accelerator(accelerator(distributed_type="NO"))


@pytest.mark.parametrize(
    ("dataset", "settings", "says"),
    [
        ([1, 2, 3, 4], {}, "collate_fn is missing"),
        (iter(()), {"collate_fn": list}, "stream"),
        ([1, 2, 3, 4], {"collate_fn": SimpleNamespace(dummy_image=True)}, "dummy_image"),
        (torch.utils.data.DataLoader([1, 2], collate_fn=list), {"batch_size": 2}, "beside a DataLoader"),
        ([1, 2, 3, 4], {"collate_fn": list, "batch_size": 4}, "global_batch_size is 8"),
    ],
)
def test_data_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, dataset: Any, settings: Any, says: str
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    plan = Plan(vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(2,)), num_microbatches=4, global_batch_size=8)
    with pytest.raises(TrainerError, match=says):
        hf_dflop.prepare(accelerator(), whole(), torch.optim.AdamW, dataset, plan, **settings)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.Muon])
def test_an_optimizer_that_looks_at_whole_matrices_is_refused_where_ranks_have_parts(kind: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = kind([{"params": [weight], "weight_decay": 0.1}], lr=0.0)
    whole = SimpleNamespace(shards=None, wire=SimpleNamespace(device=torch.device("cpu")))
    check_by_number(optimizer, whole)  # type: ignore[arg-type]
    split = SimpleNamespace(shards="some", wire=whole.wire)
    if kind in (torch.optim.AdamW, torch.optim.SGD):
        check_by_number(optimizer, split)  # type: ignore[arg-type]
    else:
        with pytest.raises(TrainerError, match=f"{kind.__name__} moves a part of a matrix"):
            check_by_number(optimizer, split)  # type: ignore[arg-type]
    assert not optimizer.state
    assert torch.equal(weight, torch.ones(4, 4))
