"""Where encoders can be cut, and their stages chained in one process: features and gradients of the whole."""

from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
import transformers as tf

from hf_dflop.data import VisionLanguageCollator
from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline.check_encoder import check_encoder, compare_encoder
from hf_dflop.pipeline.encoder import VisionPart
from hf_dflop.pipeline.split import read_cut
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import pipelines as p
from tests.distributed import videos
from tests.unit.profile.test_videos import frames

LLM = ModulePlan(layers=(2, 2))


def plan_of(*layers: int) -> Plan:
    return Plan(vision=ModulePlan(layers=layers), llm=LLM, num_microbatches=1)


def inputs_of(family: str) -> dict[str, Any]:
    collate = p.casting(p.collator(family), torch.float64)
    return collate(next(cell for cell in p.cells_of(family) if cell))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = ("llava", "paligemma", "aya_vision", "internvl", "idefics3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_encoder_is_exact_in_stages(family: str) -> None:
    built, inputs = p.model(family, encoder=3), inputs_of(family)
    compare_encoder(built, plan_of(1, 2), inputs)
    check_encoder(type(built), built.config, plan_of(1, 1, 1), inputs)


@pytest.mark.parametrize(
    ("layers", "widths"),
    [((1, 4), [16]), ((4, 1), [64]), ((2, 1, 2), [32, 48]), ((1, 1, 1, 1, 1), [16, 32, 48, 64])],
)
def test_features_taken_at_depths_travel_to_the_last_stage(
    layers: tuple[int, ...], widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the 16 hidden columns: depths 0, 1, 2 that are taken before the edge, but for one that is the edge."""
    built, inputs, stock = p.model("qwen3_vl", encoder=5, deepstack=3), inputs_of("qwen3_vl"), VisionPart.forward
    sent: list[int] = []

    def watched(
        self: VisionPart, given: Any, received: Any, form: Any, shapes: Any, *, keep: bool = True
    ) -> torch.Tensor:
        if received is not None:
            sent.append(received.shape[-1])
            if not keep:
                received = torch.cat([received[:, :16], torch.zeros_like(received[:, 16:])], dim=1)
        return stock(self, given, received, form, shapes)

    monkeypatch.setattr(VisionPart, "forward", watched)
    compare_encoder(built, plan_of(*layers), inputs)  # raises where features or gradients differ
    assert sent == widths
    if max(widths) > 16:
        monkeypatch.setattr(VisionPart, "forward", partialmethod(watched, keep=False))
        with pytest.raises(ModelError, match="differ"):
            compare_encoder(built, plan_of(*layers), inputs)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2_vl", {"depth": 3}),
        ("qwen2_5_vl", {"depth": 3, "fullatt_block_indexes": [1]}),
        ("qwen3_vl", {"depth": 5, "deepstack_visual_indexes": [0, 1, 3]}),
        ("llava_onevision", {"num_hidden_layers": 3}),
        ("llava_next_video", {"num_hidden_layers": 3}),
        ("internvl", {"num_hidden_layers": 3}),
    ],
)
def test_images_and_videos_are_exact_in_stages(family: str, settings: dict[str, Any]) -> None:
    built, layers = videos.model(family, torch.float64, **settings), next(iter(settings.values()))
    row = videos.row("Both?", [frames(6)], [frames(1, 60, 60, seed=3)[0]])
    inputs = p.casting(VisionLanguageCollator(videos.stock_processor(family)), torch.float64)([row])
    compare_encoder(built, plan_of(1, 1, layers - 2), inputs)
    check_encoder(type(built), built.config, plan_of(2, layers - 2), inputs)


def test_videos_that_do_not_run_through_the_layers_are_refused() -> None:
    """Video-LLaVA has a tower for images and one for videos."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 2, "vocab_size": 64}
    config = tf.VideoLlavaConfig(vision_config=tower, text_config=text, vision_feature_layer=-1)
    built = tf.AutoModelForImageTextToText.from_config(config).double()
    pixels = torch.randn(1, 3, 28, 28, dtype=torch.float64)
    compare_encoder(built, plan_of(1, 1), {"pixel_values": pixels})
    with pytest.raises(ModelError, match="not exact in the stages"):
        compare_encoder(built, plan_of(1, 1), {"pixel_values_videos": pixels[None]})


def test_recorded_hidden_states_of_an_earlier_stage_are_refused() -> None:
    built, inputs = p.model("llava", encoder=4, feature_layers=(2, -1)), inputs_of("llava")
    compare_encoder(built, plan_of(2, 2), inputs)
    with pytest.raises(ModelError, match="features on a small copy differ"):
        compare_encoder(built, plan_of(3, 1), inputs)


@pytest.mark.parametrize(
    ("layers", "error", "says"),
    [
        ((1, 1), ModelError, "the plan spreads 2 encoder layers"),
        ((0, 4), PlanError, "every stage of a split encoder needs a layer"),
    ],
)
def test_layers_must_be_those_of_the_encoder(layers: tuple[int, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_cut(p.model("llava", encoder=4), plan_of(*layers))


def test_a_copy_that_does_not_run_is_refused() -> None:
    built = p.model("llava", encoder=4)
    with pytest.raises(ModelError, match="could not be tried"):
        check_encoder(type(built), built.config, plan_of(2, 2), {"pixel_values": torch.zeros(1)})
