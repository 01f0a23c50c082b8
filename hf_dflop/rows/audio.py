"""What a sound is, from its file's packets or its array, and its samples.

Inputs: an audio cell (`{"bytes", "path"}` as `datasets.Audio(decode=False)` gives it, a path, a decoder that
`datasets` made, or `{"array", "sampling_rate"}`). `audio_info` decodes nothing: a file is walked through
packet by packet, which tells how many samples it holds and whether it is cut off. `load_audio` decodes, mixes the
channels and resamples.

Files are read by PyAV (`pip install "hf_dflop[audio]"`); arrays need nothing.

Assumptions: WAV, FLAC, MP3 and Ogg (Opus, Vorbis) tell how many samples come out of them; other codecs, such as AAC,
do not, and are refused. Resampled, `n` samples become `ceil(n · new rate / old rate)`, as librosa and torchaudio do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import DatasetError
from hf_dflop.rows.source import open_container

__all__ = ["AudioInfo", "audio_cells", "audio_info", "load_audio"]

_EXPECTED = (
    "a path, a dict with 'bytes' or 'path', or a dict with 'array' and 'sampling_rate' (cast a column of sounds with "
    "datasets.Audio(decode=False))"
)
_OGG = ("opus", "libopus", "vorbis", "libvorbis")
_MP3 = ("mp3", "mp3float")


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioInfo:
    """What is known of a sound without decoding it."""

    num_samples: int
    """Samples of one channel."""
    sampling_rate: int
    """Samples per second."""

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate

    def resampled(self, sampling_rate: int) -> int:
        """Samples at another rate.

        Example:
            >>> AudioInfo(num_samples=44_101, sampling_rate=44_100).resampled(16_000)
            16001
        """
        return -(-self.num_samples * sampling_rate // self.sampling_rate)


def audio_cells(value: Any) -> list[Any]:
    """The audio cells of a column's value: one sound, or a list of them."""
    if value is None:
        return []
    cells = list(value) if isinstance(value, list | tuple) else [value]
    return [cell for cell in cells if cell is not None]


def audio_info(cell: Any, *, where: str = "sound") -> AudioInfo:
    """Number of samples and sampling rate of a sound.

    Args:
        cell (`dict` or `str`): the audio cell of a row.
        where (`str`): how error messages call it, for example "row 3, column 'audio'".

    Raises:
        DatasetError: the sound cannot be read, is empty or cut off, or its codec does not tell its length.
    """
    if (array := _array(cell, where)) is not None:
        return AudioInfo(num_samples=array[0].shape[-1], sampling_rate=array[1])
    with open_container(
        cell, where=where, kind="sound", stream="audio", without="arrays", expected=_EXPECTED
    ) as container:
        stream = container.streams.audio[0]
        codec, rate = getattr(stream.codec_context, "name", "unknown"), stream.rate
        if not rate:
            raise DatasetError(f"{where}: the file tells no sampling rate")
        unit = stream.time_base * rate
        told = None if stream.duration is None else round(stream.duration * unit)
        packets, skipped = _packets(container, where)
        found = round(packets * unit)
    if codec.startswith("pcm_") or codec == "flac":
        length = found
    elif codec in _OGG:
        length, told = found - (skipped or 0), None
    elif codec in _MP3:  # only with a header of its own does the file say what the encoder put in front and behind
        length = found if skipped is None or told is None else told
        found -= skipped or 0
    else:
        raise DatasetError(
            f"{where}: a file of codec {codec!r} does not tell how many samples come out of it; store the sound as "
            "WAV, FLAC, Ogg or MP3"
        )
    if told is not None and found < told and (codec not in _MP3 or skipped is not None):
        raise DatasetError(f"{where}: the file ends after {found} of {told} samples; it is cut off")
    if length < 1:
        raise DatasetError(f"{where}: the sound holds no samples")
    return AudioInfo(num_samples=length, sampling_rate=rate)


def load_audio(cell: Any, sampling_rate: int, *, where: str = "sound") -> npt.NDArray[np.float32]:
    """The samples of a sound, of one channel, at a sampling rate, `(num_samples,)`.

    Raises:
        DatasetError: it cannot be decoded, or is longer or shorter than `audio_info` says.
    """
    info = audio_info(cell, where=where)
    array = _array(cell, where)
    samples = _decoded(cell, where) if array is None else array[0]
    samples = np.asarray(samples, dtype=np.float32)
    samples = samples.mean(axis=0) if samples.ndim == 2 else samples
    if len(samples) != info.num_samples:
        raise DatasetError(f"{where}: {len(samples)} samples were decoded where {info.num_samples} were told")
    if info.sampling_rate != sampling_rate:
        samples = _resampled(samples, info, sampling_rate)
    return np.ascontiguousarray(samples)


def _array(cell: Any, where: str) -> tuple[npt.NDArray[Any], int] | None:
    """Samples and rate of a cell that is decoded already."""
    if not isinstance(cell, Mapping) or cell.get("array") is None:
        return None
    try:
        array = np.asarray(cell["array"], dtype=np.float32)
        rate = int(cell["sampling_rate"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{where}: 'array' and 'sampling_rate' are not numbers ({error})") from error
    if array.ndim not in (1, 2) or not array.size or rate < 1:
        raise DatasetError(
            f"{where}: an array of shape {array.shape} at {rate} Hz is no sound; expected (num_samples,) or "
            "(num_channels, num_samples)"
        )
    return array, rate


def _packets(container: Any, where: str) -> tuple[int, int | None]:
    """Length of all packets in the stream's time base, and samples to skip at the start where the file says so."""
    length, skipped = 0, None
    try:
        for i, packet in enumerate(container.demux(audio=0)):
            length += (packet.duration or 0) if packet.size else 0
            if not i:
                for side in packet.iter_sidedata():
                    if side.data_type == "skip_samples":
                        skipped = int.from_bytes(bytes(side)[:4], "little")
    except Exception as error:
        raise DatasetError(f"{where}: the sound cannot be read: {error}") from error
    return length, skipped


def _decoded(cell: Any, where: str) -> npt.NDArray[np.float32]:
    """`(num_channels, num_samples)`."""
    import av

    with open_container(
        cell, where=where, kind="sound", stream="audio", without="arrays", expected=_EXPECTED
    ) as container:
        try:
            layout = container.streams.audio[0].layout.name
            plain = av.AudioResampler(format="fltp", layout=layout)
            frames = [f.to_ndarray() for frame in container.decode(audio=0) for f in plain.resample(frame)]
            frames += [f.to_ndarray() for f in plain.resample(None)]
        except Exception as error:
            raise DatasetError(f"{where}: the sound cannot be decoded: {error}") from error
    return np.concatenate(frames, axis=1) if frames else np.zeros((1, 0), np.float32)


def _resampled(samples: npt.NDArray[np.float32], info: AudioInfo, rate: int) -> npt.NDArray[np.float32]:
    """Resampled by a polyphase filter, cut or filled with silence to the length that is counted."""
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = info.sampling_rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    pieces = [f.to_ndarray()[0] for given in (frame, None) for f in resampler.resample(given)]
    whole = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    length = info.resampled(rate)
    return np.pad(whole[:length], (0, max(0, length - len(whole))))
