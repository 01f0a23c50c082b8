"""FLOP formulas against torch's own counter on tiny real models, forward and backward."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_dflop.cost import ModelSpec, Trainable, module_flops, training_flops

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models

sys.path.pop(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_forward_within_one_percent(name: str) -> None:
    model, inputs, shapes = tiny_models.MODELS[name]()
    spec = ModelSpec.from_config(model.config)
    assert ModelSpec.from_config(model.config.to_dict()) == spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert spec.image_token_id == tiny_models.IMAGE_ID
    assert shapes.llm_tokens[0] == inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    predicted = module_flops(spec, shapes, causal_factor=1.0).total[0]
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_partial_windows_are_close() -> None:
    # 14 x 18 patches do not fill windows of 4 x 4: full windows are assumed, which is an upper bound
    model, _, _ = tiny_models.qwen2_5_vl()
    inputs, shapes = tiny_models.qwen_inputs((1, 14, 18), 30)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    ratio = module_flops(ModelSpec.from_config(model.config), shapes, causal_factor=1.0).total[0]
    ratio /= counter.get_total_flops()
    assert 1.0 <= ratio < 1.03


def test_frames_attend_apart() -> None:
    model, _, _ = tiny_models.qwen2_vl()
    inputs, shapes = tiny_models.qwen_inputs((3, 8, 12), 30)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    predicted = module_flops(ModelSpec.from_config(model.config), shapes, causal_factor=1.0).total[0]
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)


def _modules(model: Any) -> tuple[Any, Any, list[Any]]:
    """Encoder, connector, LLM parts; the Qwen merger is a child of the encoder."""
    if hasattr(model.model, "visual"):
        return model.model.visual, model.model.visual.merger, [model.model.language_model, model.lm_head]
    core = model.model
    return core.vision_tower, core.multi_modal_projector, [core.language_model, model.lm_head]


@pytest.mark.parametrize("name", ["llava_clip_llama", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize(
    ("trainable", "checkpointing"),
    [
        (Trainable(), False),
        (Trainable(), True),
        (Trainable(vision=False), False),
        (Trainable(vision=False, llm=False), False),
        (Trainable(connector=False, llm=False), False),
        (Trainable(vision=False, connector=False), False),
        (Trainable(vision=False, connector=False), True),
    ],
    ids=["all", "all-ckpt", "frozen-vision", "connector-only", "vision-only", "llm-only", "llm-only-ckpt"],
)
def test_training_step(name: str, trainable: Trainable, checkpointing: bool) -> None:
    model, inputs, shapes = tiny_models.MODELS[name]()
    vision, connector, llm = _modules(model)
    vision.requires_grad_(trainable.vision)
    connector.requires_grad_(trainable.connector)
    for part in llm:
        part.requires_grad_(trainable.llm)
    if checkpointing:
        # an older transformers has the second name alone
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False).logits.sum().backward()
    spec = ModelSpec.from_config(model.config)
    predicted = training_flops(spec, shapes, trainable, checkpointing, causal_factor=1.0).total[0]
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)
