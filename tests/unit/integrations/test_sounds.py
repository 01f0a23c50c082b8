"""Where sounds are not taken, an error says so before anything is loaded; where they are, encoders stay together."""

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hf_dflop import Cluster, VisionLanguageCollator, make_plan, profile_dataset, simulate
from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.data.step_plan import stock_caps
from hf_dflop.errors import DatasetError, ModelError, PlanError, ProcessorError, TrainerError
from hf_dflop.integrations.checks import check_images_and_collectives
from hf_dflop.integrations.loss_check import _hands_on
from hf_dflop.integrations.pipeline_data import make_slots
from hf_dflop.pipeline.kinds import refuse_sounds
from hf_dflop.pipeline.structure import read_structure
from hf_dflop.plan import ModulePlan, Plan
from hf_dflop.profile.measure import measure_model
from hf_dflop.shapes import Shapes
from tests.distributed import hearing
from tests.distributed import tiny as vision
from tests.unit.rows import tiny

ROW = {"question": "What?", "answer": "a cat", "audio": {"array": [0.0] * 20_000, "sampling_rate": 16_000}}
PLAN = Plan(vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(2,)), num_microbatches=1, global_batch_size=2)


@pytest.fixture(scope="module")
def annotated() -> Any:
    return profile_dataset(datasets.Dataset.from_list([ROW] * 4), tiny.audioflamingo3(), verify=0)[0]


def test_ranks_without_an_encoder() -> None:
    with pytest.raises(DatasetError, match=r"row 1: holds a sound, and only images are routed"):
        VisionLanguageCollator(tiny.audioflamingo3()).without_pixels([{**ROW, "audio": None}, ROW])


def test_a_dummy_image_for_a_model_without_images() -> None:
    with pytest.raises(ProcessorError, match="AudioFlamingo3Processor takes no images"):
        VisionLanguageCollator(tiny.audioflamingo3(), dummy_image=True)


def test_plans_and_pipelines(annotated: Any) -> None:
    model = hearing.audioflamingo3(tiny.audioflamingo3())
    shapes = Shapes.of_dataset(annotated)
    cluster = Cluster(nodes=1, gpus_per_node=2, gpu="H100-80GB")
    with pytest.raises(PlanError, match="takes sounds and no images; plans do not place"):
        make_plan(model.config, shapes, cluster, global_batch_size=2)
    spec = ModelSpec.from_config(vision.model().config)
    for call in (
        lambda: make_plan(spec, shapes, cluster, global_batch_size=2),
        lambda: simulate(PLAN, shapes, CostModel.analytic(spec)),
    ):
        with pytest.raises(PlanError, match="4 samples have sounds; plans do not place an audio encoder"):
            call()
    with pytest.raises(ModelError, match="takes sounds and no images; an audio encoder is not measured"):
        measure_model(model.config)
    with pytest.raises(ModelError, match="has no get_image_features"):
        read_structure(model)
    with pytest.raises(TrainerError, match="4 samples have sounds, and a pipeline runs images and videos alone"):
        make_slots(SimpleNamespace(dataset=annotated), SimpleNamespace(plan=PLAN), None, None, slots=1, training=True)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"a microbatch holds sounds \(input_features\)"):
        refuse_sounds([None, {"pixel_values": torch.ones(1)}, {"input_features": torch.ones(1)}], "Model")
    refuse_sounds([{"input_features": None, "input_ids": torch.ones(1)}], "Model")


def counts(images: list[int], sounds: list[int]) -> Shapes:
    image, audio = np.array(images), np.array(sounds)
    return Shapes(
        num_images=image, image_tiles=image, image_patches=4 * image, image_patches_sq=16 * image,
        image_tokens=4 * image, text_tokens=0 * image + 5, label_tokens=0 * image + 3, num_audios=audio,
        audio_chunks=audio, audio_frames=100 * audio, audio_frames_sq=10_000 * audio, audio_tokens=25 * audio,
        audio_ms=1000 * audio,
    )  # fmt: skip


def test_a_microbatch_needs_what_any_encoder_of_the_dataset_needs() -> None:
    assert counts([0, 0], [0, 1]).feeds_encoders.tolist() == [False, True]
    assert counts([1, 0, 1], [1, 1, 0]).feeds_encoders.tolist() == [True, False, False]
    assert counts([0, 0], [0, 0]).feeds_encoders.tolist() == [False, False]
    assert stock_caps(counts([2, 0], [0, 3]), 2).max_patches == 600
    sharded: Any = SimpleNamespace(
        model_wrapped=None, is_fsdp_enabled=True, is_deepspeed_enabled=False, args=SimpleNamespace(world_size=2)
    )
    given: dict[str, Any] = {"spreads": True, "fills": False, "groups_per_step": 4}
    some = counts([0] * 4, [1, 1, 1, 0])
    assert check_images_and_collectives(sharded, some, samples_per_step=8, **given)
    assert not check_images_and_collectives(sharded, counts([0] * 4, [1] * 4), samples_per_step=4, **given)
    with pytest.raises(
        TrainerError, match=r"1 of 4 samples have not a sound.*3\.0 samples with a sound.*Remedy: train on"
    ):
        check_images_and_collectives(sharded, some, samples_per_step=4, **given)
    with pytest.raises(TrainerError, match="2 of 4 samples have not an image and a sound"):
        check_images_and_collectives(sharded, counts([1, 0, 1, 1], [1, 1, 1, 0]), samples_per_step=4, **given)


def test_losses_that_are_believed_to_be_divided() -> None:
    import transformers as tf

    assert _hands_on(tf.AudioFlamingo3ForConditionalGeneration)
    assert _hands_on(tf.LlavaForConditionalGeneration)
    assert not _hands_on(tf.Qwen2AudioForConditionalGeneration)
