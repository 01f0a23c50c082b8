"""An optimizer's state to a distributed checkpoint and back, on one rank; what does not fit is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_dflop.errors import TrainerError
from hf_dflop.integrations.pipeline_state import load_optimizer, save_optimizer


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def share(width: int = 3) -> Any:
    """What a rank of the last stage holds of a model whose head is tied to an embedding elsewhere."""
    own: Any = nn.Module()
    own.layer, own.head = nn.Linear(width, width), nn.Linear(width, 2, bias=False)
    own.place, own.shards, own.wire = SimpleNamespace(rank=0), None, SimpleNamespace(device=torch.device("cpu"))
    own.lasting_names = lambda: {name: name.replace("head", "embedding") for name, _ in own.named_parameters()}
    own.share = lambda name, value: value
    return own


def groups(own: Any) -> list[dict[str, Any]]:
    return [{"params": [own.layer.bias], "weight_decay": 0.0}, {"params": [own.head.weight, own.layer.weight]}]


def adamw(own: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(own), lr=0.5, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True)


def step(own: Any, optimizer: torch.optim.Optimizer, *, times: int = 3) -> torch.optim.Optimizer:
    for _ in range(times):
        for parameter in own.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    return optimizer


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Bit by bit, with the types of all options."""
    if found["param_groups"] != expected["param_groups"] or found["state"].keys() != expected["state"].keys():
        return False
    return all(
        values.keys() == expected["state"][key].keys()
        and all(torch.equal(torch.as_tensor(v), torch.as_tensor(expected["state"][key][k])) for k, v in values.items())
        for key, values in found["state"].items()
    )


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        adamw,
        lambda own: torch.optim.SGD(groups(own), lr=0.5),
        lambda own: torch.optim.Adafactor(groups(own), lr=0.5),
        lambda own: torch.optim.Adam(groups(own), lr=torch.tensor(0.5), capturable=False, foreach=False),
    ],
)
def test_state_groups_and_counters_come_back(
    make: Callable[[Any], torch.optim.Optimizer], trained: bool, tmp_path: Path
) -> None:
    own = share()
    optimizer = step(own, make(own)) if trained else make(own)
    save_optimizer(own, optimizer, str(tmp_path))
    again = make(own)
    again.param_groups[0]["lr"] = again.param_groups[0]["lr"] * 2
    load_optimizer(own, again, str(tmp_path))
    assert same(again.state_dict(), optimizer.state_dict())
    assert trained == (not same(make(own).state_dict(), optimizer.state_dict())) or not optimizer.state


def test_a_second_save_replaces_the_first_and_holds_no_pickle(tmp_path: Path) -> None:
    own = share()
    save_optimizer(own, step(own, adamw(own)), str(tmp_path))
    (tmp_path / "optimizer" / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"of more ranks")
    save_optimizer(own, step(own, adamw(own)), str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "optimizer").iterdir())
    assert names == ["groups.json", "shard-00001-model-00001-of-00001.safetensors"]
    told = json.loads((tmp_path / "optimizer" / "groups.json").read_text())
    assert told["groups"][1]["shapes"] == {"embedding.weight": [2, 3], "layer.weight": [3, 3]}


def test_numbers_and_tensors_of_the_same_memory(tmp_path: Path) -> None:
    own = share()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
    table = torch.arange(4.0)
    optimizer.state[own.layer.weight] = {"table": table, "factor": 0.1, "seen": 7, "other": None}
    optimizer.state[own.layer.bias] = {"table": table}
    save_optimizer(own, optimizer, str(tmp_path))
    again = torch.optim.SGD(own.parameters(), lr=0.5)
    load_optimizer(own, again, str(tmp_path))
    found = again.state[own.layer.weight]
    assert torch.equal(found["table"], table)
    assert (found["factor"], found["seen"], found["other"]) == (0.1, 7, None)
    assert torch.equal(again.state[own.layer.bias]["table"], table)


def test_state_that_is_neither_is_refused(tmp_path: Path) -> None:
    own = share()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
    optimizer.state[own.layer.weight] = {"factors": [torch.ones(2)]}
    with pytest.raises(TrainerError, match=r"keeps a list as factors of layer\.weight"):
        save_optimizer(own, optimizer, str(tmp_path))


def test_what_is_of_another_run_is_refused(tmp_path: Path) -> None:
    own = share()
    with pytest.raises(TrainerError, match="no pipeline wrote its optimizer"):
        load_optimizer(own, adamw(own), str(tmp_path))
    frozen = share()
    optimizer = torch.optim.AdamW([{"params": [frozen.layer.bias]}, {"params": [frozen.head.weight]}])
    save_optimizer(frozen, step(frozen, optimizer), str(tmp_path))
    with pytest.raises(TrainerError, match=r"layer\.weight is in the optimizer's group 1; .* lacks it"):
        load_optimizer(own, adamw(own), str(tmp_path))
    with pytest.raises(TrainerError, match="has 2 parameter groups, this one 1"):
        load_optimizer(own, torch.optim.AdamW(own.parameters()), str(tmp_path))
    save_optimizer(own, step(own, adamw(own)), str(tmp_path))
    swapped = torch.optim.AdamW(list(reversed(groups(own))))
    with pytest.raises(TrainerError, match="has it in group 1"):
        load_optimizer(own, swapped, str(tmp_path))
    wider = share(4)
    with pytest.raises(TrainerError, match=r"layer\.bias has the shape \(4,\), and \(3,\) in .*another model"):
        load_optimizer(wider, adamw(wider), str(tmp_path))
