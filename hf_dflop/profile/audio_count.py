"""What a sound of a given length becomes under a processor: chunks and frames of the audio encoder, text for the LLM.

Input: `AudioInfo`. Output: `AudioCount`. The processor itself is run on silence of the length, once for each length,
so that no rule is written a second time here; lengths between two that gave the same are not run.

Frames are those that the encoder computes. Where the processor fills every chunk to one length (Whisper), these are
all frames of the chunk. Where it fills sounds to the longest of the microbatch, frames are those of the sound alone,
like tokens without padding. An encoder whose config tells a window (`n_window`) is given the sound's own frames, cut
into windows.

Assumptions: counts depend on the length alone, and grow with it. That nothing depends on the other sounds of a
microbatch is tried once, on two of them.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.profile.image_count import fold, unfold
from hf_dflop.rows.audio import AudioInfo
from hf_dflop.rows.render import audio_extractor, audio_token

__all__ = ["AudioCount", "AudioCounter"]

_PROBES_S = (0.5, 2.0)
"""Seconds of silence that show whether chunks are filled to one length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioCount:
    """What one sound costs."""

    chunks: int
    """Encoder attention sequences."""
    frames: int
    """Frames over all chunks."""
    frames_sq: int
    """Sum over the chunks of (frames of the chunk)²."""
    audio_tokens: int
    """LLM positions that hold features of it."""
    folded: str
    """What the processor writes in place of the placeholder, with every run of the feature token written once."""
    runs: tuple[int, ...]
    """Lengths of those runs, in order."""
    feature: str
    """The feature token."""

    @property
    def replacement(self) -> str:
        """What the processor writes in place of the placeholder, in full."""
        return unfold(self.folded, self.runs, self.feature)


class AudioCounter:
    """Counts chunks, frames and tokens of sounds, for one processor that takes them.

    Args:
        processor (`ProcessorMixin`): a processor with a placeholder and a feature extractor of sounds.
        config (`PreTrainedConfig`, *optional*): configuration of the model, for the window of its audio encoder.
    """

    def __init__(self, processor: Any, config: Any = None) -> None:
        token, extractor = audio_token(processor), audio_extractor(processor)
        assert token is not None
        self.processor = processor
        self.token = token
        self.sampling_rate = int(getattr(extractor, "sampling_rate", 0))
        self._window = _window(config)
        self._fixed: bool | None = None
        self._broken: str | None = None
        self._refuses_two: str | None = None
        self._lengths: list[int] = []
        self._counts: dict[int, AudioCount] = {}

    def count(self, infos: Sequence[AudioInfo]) -> list[AudioCount]:
        """Counts of the sounds of one sample.

        Raises:
            DatasetError: the processor refuses a sound of this length.
            ProcessorError: sounds of this processor cannot be counted.
        """
        self._check(len(infos))
        return [self._of(info.resampled(self.sampling_rate)) for info in infos]

    def chunks_of(self, output: Mapping[str, Any]) -> list[int]:
        """Frames of each chunk that the encoder runs, from what the processor gave.

        Raises:
            ProcessorError: the features have a form that is not known here.
        """
        features = _features(output)
        if features is None:
            return []
        found = _frames(features, output)
        if found is None:
            raise self._unknown(f"gives features of shape {tuple(features.shape)} and no mask that tells their time")
        length, valid = found
        if self._window:
            return [min(self._window, n - i) for n in valid for i in range(0, n, self._window)]
        return [length] * len(valid) if self._is_fixed() else valid

    def _check(self, num_sounds: int) -> None:
        """Whether the processor can be run on silence, takes several sounds in a row, and keeps sounds apart."""
        if not self.sampling_rate:
            raise self._unknown("tells no sampling rate")
        if self._broken is None:
            self._broken = self._find_broken() or ""
        if self._broken:
            raise self._unknown(self._broken)
        if num_sounds > 1:
            if self._refuses_two is None:
                self._refuses_two = ""
                try:
                    self._called([self.token.placeholder * 2], [self.sampling_rate] * 2)
                except DatasetError as error:
                    self._refuses_two = str(error)
            if self._refuses_two:
                raise DatasetError(f"{num_sounds} sounds in one row: {self._refuses_two}")

    def _find_broken(self) -> str | None:
        """Why sounds of this processor cannot be counted."""
        token, lengths = self.token.placeholder, [self.sampling_rate // 2 + 1, 2 * self.sampling_rate]
        try:
            alone = [self._called([token], [length]) for length in lengths]
            together = self._called([token] * 2, lengths)
            chunks = [self.chunks_of(output) for output in alone]
            if not all(chunks):
                return "gives no frames of features"
            same = self.chunks_of(together) == [*chunks[0], *chunks[1]]
            texts = [_replacement(output["text_replacement_offsets"][0]) for output in alone]
            same &= texts == [_replacement(row) for row in together["text_replacement_offsets"]]
        except (KeyError, ValueError, IndexError) as error:
            return f"fails on silence: {error}"
        if not same:
            return (
                "makes of a sound what depends on the others of its microbatch. Where it fills sounds to the longest, "
                'processor.audio_kwargs = {**processor.audio_kwargs, "padding": "max_length"} makes them independent'
            )
        return None

    def _is_fixed(self) -> bool:
        if self._fixed is None:
            lengths = []
            for seconds in _PROBES_S:
                output = self._run(int(seconds * self.sampling_rate))[1]
                found = None if (features := _features(output)) is None else _frames(features, output)
                lengths.append(None if found is None else found[0])
            self._fixed = lengths[0] == lengths[1]
        return self._fixed

    def _of(self, length: int) -> AudioCount:
        if length not in self._counts:
            place = bisect.bisect_left(self._lengths, length)
            around = [self._counts[self._lengths[i]] for i in (place - 1, place) if 0 <= i < len(self._lengths)]
            if len(around) == 2 and around[0] == around[1]:
                return around[0]
            self._counts[length] = self._count(length)
            self._lengths.insert(place, length)
        return self._counts[length]

    def _count(self, length: int) -> AudioCount:
        replacement, output = self._run(length)
        chunks = self.chunks_of(output)
        feature = self.token.feature
        if feature not in replacement:
            raise DatasetError(
                f"{type(self.processor).__name__} writes no token for a sound of {length} samples at "
                f"{self.sampling_rate} Hz: it is too short"
            )
        tokenizer = self.processor.tokenizer
        if list(tokenizer(feature * 3, add_special_tokens=False)["input_ids"]) != [self.token.feature_id] * 3:
            raise self._unknown(f"repeats {feature!r}, which its tokenizer splits")
        folded, runs = fold(replacement, feature)
        return AudioCount(
            chunks=len(chunks),
            frames=sum(chunks),
            frames_sq=sum(frames**2 for frames in chunks),
            audio_tokens=sum(runs),
            folded=folded,
            runs=runs,
            feature=feature,
        )

    def _run(self, length: int) -> tuple[str, Mapping[str, Any]]:
        """What the processor writes in place of so many samples of silence, and its tensors."""
        output = self._called([self.token.placeholder], [length])
        return _replacement(output["text_replacement_offsets"][0]), output

    def _called(self, texts: list[str], lengths: list[int]) -> Mapping[str, Any]:
        """The processor's output for texts with sounds of silence."""
        try:
            return dict(
                self.processor(
                    text=texts,
                    audio=[np.zeros(length, np.float32) for length in lengths],
                    audio_kwargs={"sampling_rate": self.sampling_rate, "return_tensors": "pt"},
                    text_kwargs={"return_tensors": None, "padding": len(texts) > 1, "truncation": False},
                    return_text_replacement_offsets=True,
                )
            )
        except Exception as error:
            name, seconds = type(self.processor).__name__, max(lengths) / self.sampling_rate
            raise DatasetError(f"{name} refuses a sound of {seconds:.4g} s: {error}") from error

    def _unknown(self, cause: str) -> ProcessorError:
        return ProcessorError(f"sounds of {type(self.processor).__name__} cannot be counted: it {cause}")


def _replacement(replaced: Sequence[Mapping[str, Any]]) -> str:
    """What was written in place of the one sound of a text."""
    (entry,) = replaced
    return str(entry["replacement"])


def _window(config: Any) -> int:
    """Frames within which the encoder attends; 0 where the config tells none."""
    audio = getattr(config, "audio_config", None)
    half = getattr(audio, "n_window", None)
    return int(getattr(audio, "n_window_infer", None) or 2 * half) if half else 0


def _features(output: Mapping[str, Any]) -> Any:
    """The features `(chunks, time, values)` or `(chunks, values, time)`; `None` without a sound."""
    found = [
        value
        for key, value in output.items()
        if getattr(value, "ndim", 0) == 3 and ("feature" in key or "audio" in key) and value.is_floating_point()
    ]
    return found[0] if len(found) == 1 else None


def _frames(features: Any, output: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """Frames of every chunk with padding, and without it."""
    for key, mask in output.items():
        if getattr(mask, "ndim", 0) == 2 and "mask" in key and ("feature" in key or "audio" in key):
            length = int(mask.shape[1])
            if len(mask) == len(features) and length in features.shape[1:]:
                return length, [int(n) for n in mask.sum(dim=1)]
    return None
