"""Models wrapped by peft: which are taken, and what a checkpoint of them holds."""

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model

from hf_dflop.errors import ModelError
from hf_dflop.pipeline.skeleton import Skeleton, unwrap
from tests.distributed import tiny

TARGETS = r".*language_model.*(q_proj|down_proj)"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (AdaLoraConfig(target_modules=TARGETS, total_step=10), "ADALORA"),
        (LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", alora_invocation_tokens=[4]), "alora"),
    ],
)
def test_adapters_that_stages_would_not_see_are_refused(config: PeftConfig, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        unwrap(get_peft_model(tiny.model(), config))


def test_a_parameter_of_the_wrapper_is_refused() -> None:
    wrapped = get_peft_model(tiny.model(), LoraConfig(target_modules=TARGETS))
    wrapped.base_model.bank = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ModelError, match=r"base_model\.bank is outside"):
        unwrap(wrapped)


def test_what_is_saved_is_read_again_under_the_names_of_the_model(tmp_path: Path) -> None:
    wrapped = get_peft_model(
        tiny.model(), LoraConfig(target_modules=TARGETS, modules_to_save=["linear_2"], bias="lora_only")
    )
    wrapped.add_adapter("second", LoraConfig(target_modules=r".*v_proj"))
    model = unwrap(wrapped)
    skeleton = Skeleton(wrapped)
    assert all(value.is_meta for value in skeleton.model.state_dict().values())
    names = skeleton.saved_names()
    assert names is not None
    state = model.state_dict()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained <= names
    assert any("second" in name for name in names)
    skeleton.save(str(tmp_path), {name: state[name] for name in names})
    found = skeleton.load(str(tmp_path), torch.float32)
    assert found.keys() == names
    assert all(torch.equal(found[name], state[name]) for name in names)
