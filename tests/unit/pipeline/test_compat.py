"""Features enter a forward that takes no `mm_encoder_outputs` as they do one that takes them."""

from typing import Any

import pytest
import torch

from hf_dflop.errors import ModelError
from hf_dflop.pipeline import _compat
from hf_dflop.pipeline.features import read_format
from hf_dflop.pipeline.split import LlmPart, build_part
from hf_dflop.pipeline.structure import read_structure
from tests.distributed import pipelines


def _grads(part: LlmPart, inputs: dict[str, Any], rows: torch.Tensor, forms: Any) -> list[torch.Tensor]:
    """Those of the features, then of the parameters; and the stage's output first."""
    part.zero_grad()
    leaf = rows.clone().requires_grad_()
    output = part(inputs, leaf, forms, None)
    output.square().sum().backward()
    assert leaf.grad is not None
    return [output.detach(), leaf.grad, *(p.grad for p in part.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
def test_received_features_stand_in_for_get_image_features(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = pipelines.model(family), pipelines.plan((1, 2, 1))
    structure = read_structure(model)
    inputs = pipelines.casting(pipelines.collator(family), torch.float64)(pipelines.cells_of(family)[0])
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    encoder, first = (build_part(model, structure, plan, stage) for stage in (0, 1))
    output = encoder.encode(inputs)
    forms = {kind: read_format(features) for kind, features in output.items()}
    rows = encoder(inputs, None, forms).detach()
    expected = _grads(first, inputs, rows, forms)
    with monkeypatch.context() as patched:
        patched.setattr(_compat, "takes_outputs", lambda body: False)
        found = _grads(first, inputs, rows, forms)
        assert not any(name.startswith("get_") for name in vars(first.model.get_submodule(first.body)))
        assert not torch.equal(expected[0], _grads(first, inputs, rows.flip(0), forms)[0])
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))


def test_a_forward_that_asks_never_or_twice_for_its_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Body(torch.nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return pixel_values

        def forward(self, input_ids: Any, pixel_values: Any = None, image_sizes: Any = None) -> Any:
            return sum(self.get_image_features(pixel_values) for _ in range(self.times))

    given = {"input_ids": torch.zeros(1, 2), "mm_encoder_outputs": {"image": torch.tensor(7)}}
    assert _compat.takes_features(Body(1))
    assert _compat.encoder_inputs(Body(1)) == ("pixel_values", "image_sizes")
    assert _compat.call_with_features(once := Body(1), once, **given) == 7
    for times in (0, 2):
        with pytest.raises(ModelError, match="from one call of get_image_features"):
            _compat.call_with_features(body := Body(times), body, **given)
