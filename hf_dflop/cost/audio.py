"""Structure of an audio encoder, and its FLOPs.

In: the config of a model, and shapes. Out: an `AudioSpec`, and forward FLOPs by term. Covered is Whisper's structure,
by the fields of its config (Qwen2-Audio, Qwen2.5-Omni): a convolution over frames, one that halves them, transformer
layers, an average over two positions, and a projection of one matrix. Other encoders (conformers, two-dimensional
convolutions, projectors with an activation) are told apart by what their configs lack or have more, and have no spec.

Assumptions: the sound's encoder is trained where the vision encoder is, and recomputed where it is. A chunk has whole
groups of four frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.config_fields import get, size
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = ["AUDIO_TERMS", "AudioSpec", "audio_terms", "read_audio"]

AUDIO_TERMS = ("audio_linear", "audio_attention", "audio_first")

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioSpec:
    """An audio encoder of Whisper's structure.

    Raises:
        ModelError: a size is not a positive whole number.
    """

    mel_bins: int
    """Values of a frame."""
    hidden: int
    num_layers: int
    heads: int
    intermediate: int
    """Width of the MLP, of two matrices."""
    linears: tuple[tuple[int, int], ...]
    """(input width, output width) of each matrix of the projection."""
    frames_per_position: int = 2
    positions_per_token: int = 2
    kernel: int = 3
    """Frames that each of the two convolutions sees."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", tuple((int(a), int(b)) for a, b in self.linears))
        for name in ("mel_bins", "hidden", "num_layers", "heads", "intermediate", "kernel"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ModelError(f"AudioSpec.{name} is {getattr(self, name)!r}; it must be a whole number >= 1.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AudioSpec":
        """From what `dataclasses.asdict` gives."""
        return cls(**data)


def read_audio(config: Any, out: int) -> AudioSpec | None:
    """The audio encoder of a config.

    Args:
        config (`PreTrainedConfig` or `dict`): of a whole model.
        out (`int`): width of the LLM.

    Returns:
        `AudioSpec`: `None` where the model has none, or one that is not covered.
    """
    audio = get(config, "audio_config")
    fields = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    if audio is None or any(get(audio, name) is None for name in fields):
        return None
    if get(audio, "downsample_hidden_size"):  # two-dimensional convolutions
        return None
    if get(config, "projector_hidden_act") is not None and get(audio, "output_dim") is None:
        return None  # positions are averaged in some of these, and laid side by side in others (Voxtral)
    hidden = size(audio, ("d_model",), "audio")
    return AudioSpec(
        mel_bins=size(audio, ("num_mel_bins",), "audio"),
        hidden=hidden,
        num_layers=size(audio, ("encoder_layers",), "audio"),
        heads=size(audio, ("encoder_attention_heads",), "audio"),
        intermediate=size(audio, ("encoder_ffn_dim",), "audio"),
        linears=((hidden, int(get(audio, "output_dim", default=out))),),
    )


def audio_terms(spec: AudioSpec, shapes: Shapes) -> dict[str, FloatArray]:
    """Forward FLOPs of each sample's sounds, each float64 `(num_samples,)`.

    `audio_first` is the first convolution, which needs no input gradient; `audio_linear` all other weights.
    """
    frames = shapes.audio_frames.astype(np.float64)
    positions = frames / spec.frames_per_position
    pairs = shapes.audio_frames_sq / float(spec.frames_per_position**2)
    layer = 2.0 * spec.hidden * (4 * spec.hidden + 2 * spec.intermediate)
    second = 2.0 * spec.kernel * spec.hidden**2
    projection = sum(2.0 * fan_in * fan_out for fan_in, fan_out in spec.linears) / spec.positions_per_token
    return {
        "audio_first": 2.0 * spec.kernel * spec.mel_bins * spec.hidden * frames,
        "audio_linear": (spec.num_layers * layer + second + projection) * positions,
        "audio_attention": 4.0 * spec.num_layers * spec.hidden * pairs,
    }
