"""What a rank reads of a checkpoint: its own weights, bit for bit, and nothing of the others'."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, modeling_utils

from hf_dflop.errors import ModelError
from hf_dflop.pipeline import reading
from hf_dflop.pipeline.reading import read_needed
from hf_dflop.pipeline.router import read_routers
from hf_dflop.pipeline.split import owner_stage, read_cut, unread_names
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import pipelines as p


def plan_of(encoder: tuple[int, ...], layers: int = 4) -> Plan:
    llm = ModulePlan(layers=(2, layers - 2))
    return Plan(vision=ModulePlan(layers=encoder), llm=llm, num_microbatches=2)


WHOLE = plan_of((4,))


def read(folder: Path, plan: Plan, stage: int, **settings: Any) -> Any:
    def load() -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, **settings)

    return read_needed(load, lambda model: unread_names(read_cut(model, plan), plan, (stage,)))


class WatchedFile:
    """A file that notes which of its tensors are read."""

    def __init__(self, noted: set[str], *args: Any, **kwargs: Any) -> None:
        self.file, self.noted = safe_open(*args, **kwargs), noted

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.__exit__(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, key: str) -> "WatchedSlice":
        return WatchedSlice(self.file.get_slice(key), key, self.noted)


class WatchedSlice:
    def __init__(self, stored: Any, key: str, noted: set[str]) -> None:
        self.stored, self.key, self.noted = stored, key, noted

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        self.noted.add(self.key)
        return self.stored[index]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the tensors that are read from files."""
    found: set[str] = set()
    for module in (reading, modeling_utils):
        monkeypatch.setattr(module, "safe_open", lambda *args, **kwargs: WatchedFile(found, *args, **kwargs))
    return found


def sizes_of(folder: Path) -> dict[str, int]:
    return {key: value.numel() for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def routers(model: Any, structure: Any) -> Any:
    """What router logits travel, or why they do not."""
    try:
        return read_routers(model, structure)
    except ModelError as error:  # transformers computes this loss from 5.18 on
        return str(error)


@pytest.mark.parametrize(
    ("family", "encoder", "settings"),
    [
        ("llava", (4,), {"layers": 12}),  # names that begin alike
        ("llava", (2, 2), {}),
        ("qwen2_5_vl", (2, 2), {"tied": True}),
        ("qwen3_vl", (2, 2), {"deepstack": 2}),
        ("gemma3", (4,), {"tied": True}),
        ("qwen3_vl_moe", (4,), {"balance": 0.1}),
        ("glm4v_moe", (2, 2), {}),
    ],
)
def test_a_stage_reads_its_own_weights_and_no_others(
    family: str, encoder: tuple[int, ...], settings: dict[str, Any], tmp_path: Path, noted: set[str]
) -> None:
    plan = plan_of(encoder, settings.get("layers", 4))
    p.model(family, torch.float32, encoder=4, **settings).save_pretrained(tmp_path, max_shard_size="50KB")
    sizes = sizes_of(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64)
    assert noted == sizes.keys()
    structure, expected = read_cut(whole, plan), whole.state_dict()
    owners = {name: owner_stage(structure, plan, name) for name in expected}
    tied = {structure.embedding + ".weight", "lm_head.weight"} if structure.tied else set()
    seen: set[str] = set()
    for stage in range(plan.vision.num_stages + plan.llm.num_stages):
        noted.clear()
        model = read(tmp_path, plan, stage, dtype=torch.float64)
        needed = {name for name, owner in owners.items() if owner == stage}
        needed |= tied if tied & needed else set()
        if structure.stack is not None and 0 < stage < plan.vision.num_stages:  # runs what precedes the layers
            needed |= {name for name, owner in owners.items() if owner == 0 and structure.stack.layers not in name}
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert {name for name, value in found.items() if not value.is_meta} == needed
        assert all(torch.equal(found[name], expected[name]) for name in needed)
        assert all(
            torch.equal(value, whole.get_buffer(name)) for name, value in model.named_buffers() if not value.is_meta
        )
        assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}
        # Numbers read are numbers held: nothing else was read, joined experts or not.
        held = {id(value): value.numel() for name, value in model.state_dict(keep_vars=True).items() if name in needed}
        assert sum(sizes[key] for key in noted) == sum(held.values())
        assert routers(model, structure) == routers(whole, structure)
        assert read_cut(model, plan) == structure
        seen |= noted
    assert seen == sizes.keys()


def test_tied_weights_that_are_both_there_are_tied_as_their_values_say(tmp_path: Path, noted: set[str]) -> None:
    built = p.model("qwen2_5_vl", torch.float32, tied=True)
    built.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    (embedding,) = (key for key in state if "embed_tokens" in key)
    for equal in (True, False):
        save_file(state | {"lm_head.weight": state[embedding] + (not equal)}, file, metadata={"format": "pt"})
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
        for stage in range(3):
            noted.clear()
            model = read(tmp_path, WHOLE, stage)
            assert noted >= {embedding, "lm_head.weight"}
            assert len(noted) < len(state)
            assert read_cut(model, WHOLE).tied == equal
            assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_what_has_to_be_initialised_is_the_same_on_every_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = p.model("llava", torch.float32)
    built.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    lost = next(key for key in state if "multi_modal_projector.linear_1.weight" in key)
    del state[lost]
    save_file(state, file, metadata={"format": "pt"})
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    after = torch.rand(1)
    for stage in range(3):
        torch.manual_seed(0)
        with caplog.at_level(logging.WARNING):
            found = read(tmp_path, WHOLE, stage).state_dict()
        assert (
            "every rank reads the whole checkpoint: model.multi_modal_projector.linear_1.weight (1 weights)"
            in caplog.text
        )
        assert all(torch.equal(found[name], value) for name, value in whole.items())
        assert torch.equal(torch.rand(1), after)


def test_the_reader_of_transformers_is_put_back(tmp_path: Path) -> None:
    reader = modeling_utils.PreTrainedModel.__dict__["_load_pretrained_model"]
    with pytest.raises(OSError, match="nowhere"):
        read(tmp_path / "nowhere", WHOLE, 0)
    found = modeling_utils.PreTrainedModel.__dict__["_load_pretrained_model"]
    assert (type(found), found.__func__) == (type(reader), reader.__func__)
