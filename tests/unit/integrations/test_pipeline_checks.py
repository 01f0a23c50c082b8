"""What DflopTrainer refuses, before it builds anything."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from hf_dflop.errors import TrainerError
from hf_dflop.integrations.pipeline_checks import check_arguments, check_dataset, check_pieces
from hf_dflop.plan import ModulePlan, Plan

PLAN = Plan(
    vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(1, 1), dp=2), num_microbatches=4, global_batch_size=16
)
FITS: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "report_to": []}


def check(tmp_path: Any, **settings: Any) -> None:
    pipe: Any = SimpleNamespace(plan=PLAN, wire=SimpleNamespace(autocast=None))
    check_arguments(TrainingArguments(str(tmp_path), use_cpu=True, **(FITS | settings)), pipe)


def test_what_fits_passes(tmp_path: Any) -> None:
    check(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"torch_compile": True}, "torch_compile"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"bf16": True}, "autocast=torch.bfloat16"),
        ({"fp16": True}, "autocast=torch.float16"),
        ({"gradient_accumulation_steps": 3}, "Set it to 4"),
        ({"per_device_train_batch_size": 4}, "global_batch_size is 16"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainerError, match=says):
        check(tmp_path, **settings)


def test_only_a_pipeline_and_rows_by_index() -> None:
    with pytest.raises(TrainerError, match="PipelineModel"):
        check_pieces(object(), list, None)
    with pytest.raises(TrainerError, match="stream"):
        check_dataset(iter(()), "train_dataset")
