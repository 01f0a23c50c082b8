"""Structure of an audio encoder, and its FLOPs.

In: the config of a model, and shapes. Out: an `AudioSpec`, and forward FLOPs by term. Covered is Whisper's structure,
by the fields of its config: a convolution over frames, one that halves them, transformer layers, and a projection of

    one matrix, positions averaged in pairs                 no `projector_hidden_act` (Qwen2-Audio, Qwen2.5-Omni)
    two matrices, positions averaged in pairs               `projector_bias` (Audio Flamingo 3)
    two matrices, so many positions side by side            `audio_merge_size` (MOSS-Transcribe)
    two matrices, positions side by side until they are
    `intermediate_size` wide                                otherwise (Voxtral, GLM-ASR)

Other encoders (conformers, two-dimensional convolutions, windows that slide) are told apart by what their configs lack
or have more, and have no spec.

Assumptions: the sound's encoder is trained where the vision encoder is, and recomputed where it is; so is its
projection with the connector, but that of an encoder with an `output_dim` of its own. A chunk has whole groups of
frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.config_fields import get
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = ["AUDIO_TERMS", "AudioSpec", "audio_factors", "audio_terms", "read_audio"]

AUDIO_TERMS = ("audio_first", "audio_second", "audio_linear", "audio_attention", "audio_projection")
_OTHER_STRUCTURE = ("conv", "subsampl", "downsampl", "kernel", "stride", "sliding", "patch")
"""In names of fields: the encoder is not Whisper's."""
_HIDDEN, _LAYERS = ("d_model", "hidden_size"), ("encoder_layers", "num_hidden_layers")
_HEADS, _WIDTHS = ("encoder_attention_heads", "num_attention_heads"), ("encoder_ffn_dim", "intermediate_size")

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
    inner_projection: bool = False
    """The projection is a part of the encoder, and trained with it."""
    frames_per_position: int = 2
    positions_per_token: int = 2
    """Positions that are averaged, or laid side by side, before the projection."""
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


def read_audio(config: Any, out: int, assumptions: list[str] | None = None) -> AudioSpec | None:
    """The audio encoder of a config.

    Args:
        config (`PreTrainedConfig` or `dict`): of a whole model.
        out (`int`): width of the LLM.
        assumptions (`list[str]`, *optional*): what the config does not say is appended.

    Returns:
        `AudioSpec`: `None` where the model has none, or one that is not covered.
    """
    audio = get(config, "audio_config")
    if audio is None:
        return None
    sizes = [get(audio, *names) for names in (("num_mel_bins",), _HIDDEN, _LAYERS, _HEADS, _WIDTHS)]
    names = set(audio) if isinstance(audio, Mapping) else set(vars(audio))
    others = [name for name in names if any(word in name for word in _OTHER_STRUCTURE) and get(audio, name)]
    if None in sizes or others or str(get(audio, "hidden_act", default="")) in ("silu", "swish"):
        return None
    mel_bins, hidden, num_layers, heads, intermediate = (int(value) for value in sizes)
    if get(audio, "num_key_value_heads", default=heads) != heads:
        return None
    own_width, averaged = get(audio, "output_dim"), 2
    if own_width is not None:
        linears = [(hidden, int(own_width))]
    elif get(config, "projector_hidden_act") is None:
        if get(audio, "encoder_layers") is None:
            return None
        linears = [(hidden, out)]
    elif get(config, "audio_merge_size"):
        averaged = int(get(config, "audio_merge_size"))
        linears = [(averaged * hidden, out), (out, out)]
    elif get(config, "projector_bias") is not None:
        linears = [(hidden, out), (out, out)]
    elif intermediate % hidden == 0:
        averaged = intermediate // hidden
        middle = 2 * out if get(audio, "rope_parameters") else out
        linears = [(intermediate, middle), (middle, out)]
        if assumptions is not None:
            assumptions.append(
                f"{averaged} positions of the audio encoder are taken to be laid side by side, and its projector to "
                f"have two matrices, {middle} wide between them"
            )
    else:
        return None
    return AudioSpec(
        mel_bins=mel_bins,
        hidden=hidden,
        num_layers=num_layers,
        heads=heads,
        intermediate=intermediate,
        linears=tuple(linears),
        inner_projection=own_width is not None,
        positions_per_token=averaged,
    )


def audio_terms(spec: AudioSpec, shapes: Shapes) -> dict[str, FloatArray]:
    """Forward FLOPs of each sample's sounds, each float64 `(num_samples,)`.

    `audio_first` and `audio_second` are the convolutions, `audio_linear` the weights of the layers.
    """
    frames = shapes.audio_frames.astype(np.float64)
    positions = frames / spec.frames_per_position
    pairs = shapes.audio_frames_sq / float(spec.frames_per_position**2)
    projection = sum(2.0 * fan_in * fan_out for fan_in, fan_out in spec.linears) / spec.positions_per_token
    return {
        "audio_first": 2.0 * spec.kernel * spec.mel_bins * spec.hidden * frames,
        "audio_second": 2.0 * spec.kernel * spec.hidden**2 * positions,
        "audio_linear": 4.0 * spec.num_layers * spec.hidden * (2 * spec.hidden + spec.intermediate) * positions,
        "audio_attention": 4.0 * spec.num_layers * spec.hidden * pairs,
        "audio_projection": projection * positions,
    }


def audio_factors(
    spec: AudioSpec, *, encoder: bool, connector: bool, passed: bool, recompute: bool
) -> dict[str, float]:
    """How many times its forward FLOPs each term costs in a training step; see `train_factors`.

    Args:
        spec (`AudioSpec`): the encoder.
        encoder, connector (`bool`): whether encoder and projection are trained.
        passed (`bool`): gradients pass the encoder.
        recompute (`bool`): its layers are recomputed.
    """
    again = float(recompute and passed)
    last = spec.intermediate / (4 * spec.hidden + 2 * spec.intermediate)
    through = (2.0 if encoder else 1.0) * passed
    if spec.inner_projection:
        projection = 1.0 + through
    else:
        fans = [fan_in * fan_out for fan_in, fan_out in spec.linears]
        projection = 1.0 + (2.0 if connector else float(passed))
        if connector and not passed:  # the lowest trained matrix needs no input gradient
            projection -= fans[0] / sum(fans)
    return {
        "audio_first": 2.0 if encoder else 1.0,
        "audio_second": 1.0 + through,
        "audio_linear": 1.0 + through + again * (1.0 - last),
        "audio_attention": 1.0 + 2.0 * passed + again,
        "audio_projection": projection,
    }
