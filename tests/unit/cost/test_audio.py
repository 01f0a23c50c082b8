"""FLOPs of audio encoders against torch's own counter."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from hf_dflop.cost.audio import audio_terms, read_audio
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
