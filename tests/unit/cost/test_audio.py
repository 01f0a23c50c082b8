"""FLOPs of audio encoders against torch's own counter."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from hf_dflop.cost import CostModel, ModelSpec, Trainable, module_flops, training_flops
from hf_dflop.cost.audio import audio_terms, read_audio
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

AUDIO = {
    "num_mel_bins": 8,
    "d_model": 48,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 100,
}
TEXT = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def shapes_of(chunks: list[int]) -> Shapes:
    none = [0]
    return Shapes(
        num_images=none, image_tiles=none, image_patches=none, image_patches_sq=none, image_tokens=none,
        text_tokens=[9], label_tokens=[9], num_audios=[1], audio_chunks=[len(chunks)], audio_frames=[sum(chunks)],
        audio_frames_sq=[sum(n * n for n in chunks)], audio_tokens=[sum(chunks) // 4], audio_ms=[10 * sum(chunks)],
    )  # fmt: skip


def predicted(config: Any, chunks: list[int]) -> float:
    spec = read_audio(config, TEXT["hidden_size"])
    assert spec is not None
    assert read_audio(config.to_dict(), TEXT["hidden_size"]) == spec
    return float(sum(flops[0] for flops in audio_terms(spec, shapes_of(chunks)).values()))


def test_an_encoder_of_whole_chunks() -> None:
    text = {**TEXT, "model_type": "qwen2"}
    config = tf.Qwen2AudioConfig(audio_config={**AUDIO, "max_source_positions": 1500}, text_config=text)
    config._attn_implementation = "eager"
    model = tf.Qwen2AudioForConditionalGeneration(config).model
    with FlopCounterMode(display=False) as counter:
        model.multi_modal_projector(model.audio_tower(torch.randn(2, 8, 3000)).last_hidden_state)
    assert predicted(config, [3000, 3000]) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("frames", "tolerance"), [(400, 0.001), (1000, 0.001), (340, 0.03)])
def test_an_encoder_of_windows(frames: int, tolerance: float) -> None:
    """The last window is filled up for the convolutions alone."""
    config = Qwen2_5OmniThinkerConfig(audio_config={**AUDIO, "n_window": 50, "output_dim": 64}, text_config=TEXT)
    config.audio_config._attn_implementation = "eager"
    encoder = Qwen2_5OmniAudioEncoder(config.audio_config)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(8, frames), feature_lens=torch.tensor([frames]))
    windows = [min(100, frames - start) for start in range(0, frames, 100)]
    assert predicted(config, windows) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_other_encoders_have_no_spec() -> None:
    assert read_audio({"audio_config": {**AUDIO, "downsample_hidden_size": 480}}, 64) is None
    assert read_audio({"audio_config": {"hidden_size": 64, "conf_num_hidden_layers": 2}}, 64) is None
    assert read_audio({"audio_config": AUDIO, "projector_hidden_act": "gelu"}, 64) is None
    assert read_audio({}, 64) is None


WHISPER = dict(zip(("num_mel_bins", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
                   (8, 48, 3, 4, 192), strict=True))  # fmt: skip
LLM = {**TEXT, "num_hidden_layers": 2, "model_type": "qwen2"}


def flamingo() -> Any:
    encoder = {"model_type": "audioflamingo3_encoder", **WHISPER, "max_source_positions": 200}
    return tf.AudioFlamingo3ForConditionalGeneration(
        tf.AudioFlamingo3Config(audio_config=encoder, text_config=LLM, audio_token_id=299)
    )


def qwen2_audio() -> Any:
    encoder = {**AUDIO, "model_type": "qwen2_audio_encoder", "max_source_positions": 200}
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(audio_config=encoder, text_config=LLM, audio_token_index=299)
    )


def glmasr() -> Any:
    encoder = {"model_type": "glmasr_encoder", **WHISPER}
    return tf.GlmAsrForConditionalGeneration(
        tf.GlmAsrConfig(audio_config=encoder, text_config={**LLM, "model_type": "llama"}, audio_token_id=299)
    )


def voxtral() -> Any:
    encoder = {"model_type": "voxtral_encoder", **WHISPER, "max_source_positions": 200}
    text = {**LLM, "model_type": "llama", "head_dim": 16}
    return tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(audio_config=encoder, text_config=text, audio_token_id=299)
    )


@pytest.mark.parametrize("frozen", ["", "audio_tower"])
@pytest.mark.parametrize(
    ("build", "per_chunk", "mask"),
    [
        (flamingo, 100, "input_features_mask"), (qwen2_audio, 100, "feature_attention_mask"),
        (glmasr, 50, "input_features_mask"), (voxtral, 50, None),
    ],
)  # fmt: skip
def test_whole_models_of_sounds(build: Any, per_chunk: int, mask: str | None, frozen: str) -> None:
    model = build()
    model.set_attn_implementation("eager")
    if frozen:
        model.model.audio_tower.requires_grad_(False)
    spec = ModelSpec.from_config(model.config)
    assert not spec.takes_images
    assert ModelSpec.from_config(model.config.to_dict()) == spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    ids = torch.tensor([[5, *[299] * (2 * per_chunk), *range(10, 40)]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": torch.randn(2, 8, 400)}
    if mask is not None:
        given[mask] = torch.ones(2, 400, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(**given, labels=ids).loss
    shapes = replace(shapes_of([400, 400]), audio_tokens=[2 * per_chunk], text_tokens=[31])
    forward = counter.get_total_flops()
    assert float(module_flops(spec, shapes, causal_factor=1.0).total[0]) == pytest.approx(forward, rel=0.01)
    with counter:  # counts anew
        loss.backward()
    trained = training_flops(spec, shapes, Trainable(vision=not frozen), causal_factor=1.0)
    assert float(trained.total[0]) == pytest.approx(forward + counter.get_total_flops(), rel=0.01)


def test_seconds_follow_the_flops() -> None:
    spec = ModelSpec.from_config(flamingo().config)
    cost = CostModel.analytic(spec, vision_flops_per_s=1e9, llm_flops_per_s=1e9)
    one, two = shapes_of([400]), shapes_of([400, 400])
    assert cost.vision_s(two)[0] == pytest.approx(2 * cost.vision_s(one)[0])
    assert cost.vision_s(one)[0] == pytest.approx(training_flops(spec, one).audio[0] / 1e9)
    seen = Shapes(**{name: [1] for name in (field.name for field in fields(Shapes))})
    with pytest.raises(ModelError, match="1 samples have images, and the model takes sounds alone"):
        cost.vision_s(seen)


def test_a_model_of_another_audio_encoder_names_the_way_out() -> None:
    config = {"audio_config": {"hidden_size": 64, "conf_num_hidden_layers": 2}, "text_config": LLM}
    with pytest.raises(ModelError, match=r"not of Whisper's structure.*pass CostModel.analytic\(spec\) as cost_model"):
        ModelSpec.from_config(config)
