"""What a sample is, in counts: the shape columns that annotation adds to a dataset.

Shapes are counts, never seconds, so an annotated dataset stays true on another machine. Everything below
(cost, balance, plan) reads shapes and nothing else of a sample.

Assumptions: a sample's images and text are joined into one LLM sequence; the encoder attends within one
*tile* at a time (one encoder attention sequence: a crop, or a whole image; a windowed encoder's tile is the image).
A video counts as an image of which each frame is a tile, or each group of frames that become one patch.
A sound is cut into chunks, each an attention sequence of the audio encoder.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import DatasetError

__all__ = ["COLUMN_PREFIX", "NEEDED_COLUMNS", "SHAPE_COLUMNS", "Shapes"]

COLUMN_PREFIX = "dflop_"
_ABSENT: Any = None
_AUDIO = ("num_audios", "audio_chunks", "audio_frames", "audio_frames_sq", "audio_tokens", "audio_ms")
"""Fields that came later: 0 in a dataset that was annotated before, in which there were no sounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Counts of each sample; every field is an int64 array of shape `(num_samples,)`.

    Example:
        >>> shapes = Shapes(num_images=[1], image_tiles=[1], image_patches=[64], image_patches_sq=[4096],
        ...                 image_tokens=[64], text_tokens=[10], label_tokens=[6])
        >>> shapes.llm_tokens.tolist(), len(shapes)
        ([74], 1)
    """

    num_images: npt.NDArray[np.int64]
    """Images and videos of the sample."""
    image_tiles: npt.NDArray[np.int64]
    """Attention sequences that the vision encoder runs for the sample (tiles, crops, whole images, frames)."""
    image_patches: npt.NDArray[np.int64]
    """Patch positions that the encoder computes, over all tiles, before any merging, without class tokens."""
    image_patches_sq: npt.NDArray[np.int64]
    """Sum over the tiles of (patches of the tile)²: what encoder attention grows with."""
    image_tokens: npt.NDArray[np.int64]
    """LLM positions that hold features of images or videos (positions whose id is the image or the video token)."""
    text_tokens: npt.NDArray[np.int64]
    """All other LLM positions of the sample: text, template, wrapper tokens around images, timestamps of frames."""
    label_tokens: npt.NDArray[np.int64]
    """Positions that contribute to the loss: labels after the shift (`labels[1:]`) that are not -100."""
    num_audios: npt.NDArray[np.int64] = _ABSENT
    """Sounds of the sample; the audio columns may be left out where there are none."""
    audio_chunks: npt.NDArray[np.int64] = _ABSENT
    """Attention sequences that the audio encoder runs for the sample."""
    audio_frames: npt.NDArray[np.int64] = _ABSENT
    """Feature frames that the audio encoder computes, over all chunks, with the padding that it computes too."""
    audio_frames_sq: npt.NDArray[np.int64] = _ABSENT
    """Sum over the chunks of (frames of the chunk)²."""
    audio_tokens: npt.NDArray[np.int64] = _ABSENT
    """LLM positions that hold features of sounds."""
    audio_ms: npt.NDArray[np.int64] = _ABSENT
    """Milliseconds of sound, each sound rounded."""

    def __post_init__(self) -> None:
        lengths = set()
        for field in fields(self):
            given = getattr(self, field.name)
            array = np.zeros(np.shape(self.num_images), np.int64) if given is None else np.asarray(given)
            if array.ndim != 1:
                raise DatasetError(f"shape column {field.name!r} has {array.ndim} dimensions; expected (num_samples,)")
            if array.size and not np.issubdtype(array.dtype, np.integer):
                raise DatasetError(f"shape column {field.name!r} has dtype {array.dtype}; expected whole numbers")
            array = array.astype(np.int64, copy=array.flags.writeable)  # what nobody can change need not be copied
            if array.size and int(array.min()) < 0:
                index = int(array.argmin())
                raise DatasetError(f"shape column {field.name!r} is {array[index]} at sample {index}; must be >= 0")
            object.__setattr__(self, field.name, array)
            lengths.add(array.size)
        if len(lengths) > 1:
            raise DatasetError(f"shape columns have different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return int(self.num_images.size)

    @property
    def llm_tokens(self) -> npt.NDArray[np.int64]:
        """LLM sequence length of each sample, `(num_samples,)`."""
        return self.image_tokens + self.audio_tokens + self.text_tokens

    @property
    def encoder_inputs(self) -> npt.NDArray[np.int64]:
        """Patches, and frames of sounds, that encoders compute for each sample, `(num_samples,)`."""
        return self.image_patches + self.audio_frames

    @property
    def feeds_encoders(self) -> npt.NDArray[np.bool_]:
        """Whether a sample has something for every encoder that any of them uses, `(num_samples,)`."""
        used = [number > 0 for number in (self.num_images, self.num_audios) if number.any()]
        return np.logical_and.reduce(used) if used else np.zeros(len(self), dtype=np.bool_)

    @property
    def needed_media(self) -> str:
        """What such a sample has, for messages."""
        sound, image = bool(self.num_audios.any()), bool(self.num_images.any())
        return "an image and a sound" if sound and image else "a sound" if sound else "an image"

    def fingerprint(self) -> str:
        """Hash of all counts, in order: equal for the same samples in the same order."""
        digest = hashlib.sha256()
        for field in fields(self):
            if field.name in _AUDIO and not self.num_audios.any():
                continue  # as before there were such columns
            digest.update(getattr(self, field.name).astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def select(self, indices: Sequence[int] | npt.NDArray[np.integer] | slice) -> "Shapes":
        """The shapes of the samples `indices`, in that order."""
        picked = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        return Shapes(**{field.name: getattr(self, field.name)[picked] for field in fields(self)})

    def to_columns(self) -> dict[str, npt.NDArray[np.int64]]:
        """Prefixed dataset columns, one per field."""
        return {COLUMN_PREFIX + field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "Shapes":
        """Read the prefixed columns of an annotated dataset (any mapping from name to a sequence of ints).

        Raises:
            DatasetError: a shape column is missing.
        """
        missing = [name for name in NEEDED_COLUMNS if name not in columns]
        if missing:
            raise DatasetError(
                f"the dataset has no shape column {missing[0]!r}: it was not annotated, or the column was removed. "
                "Use the dataset that hf_dflop.profile_dataset returns."
            )
        given = [name for name in SHAPE_COLUMNS if name in columns]
        if given != list(SHAPE_COLUMNS) and given != list(NEEDED_COLUMNS):
            lost = next(name for name in SHAPE_COLUMNS if name not in columns)
            raise DatasetError(f"the dataset has audio columns, but no {lost!r}: annotate it again")
        return cls(**{name.removeprefix(COLUMN_PREFIX): np.asarray(columns[name]) for name in given})

    @classmethod
    def of_dataset(cls, dataset: Any) -> "Shapes":
        """The shapes of an annotated `datasets.Dataset`, whatever its format, transform or index mapping.

        Raises:
            DatasetError: not a dataset, or not annotated.
        """
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):
            raise DatasetError(
                "expected the annotated datasets.Dataset that hf_dflop.profile_dataset returns; "
                f"got {type(dataset).__name__}."
            )
        missing = [name for name in NEEDED_COLUMNS if name not in columns]
        if missing:
            raise DatasetError(
                f"the dataset has no shape column {missing[0]!r} (it has {sorted(columns)}): it was not annotated. "
                "Use `ds, profile = hf_dflop.profile_dataset(ds, processor)`."
            )
        names = [name for name in SHAPE_COLUMNS if name in columns]
        return cls.from_table(dataset.with_format(None).select_columns(names).with_format("arrow")[:])

    @classmethod
    def from_table(cls, table: Any) -> "Shapes":
        """Read the shape columns of an arrow table; a column in one piece is not copied."""
        columns = {}
        for name in (name for name in SHAPE_COLUMNS if name in table.column_names):
            column = table.column(name)
            whole = column.chunk(0) if column.num_chunks == 1 else column
            columns[name] = whole.to_numpy(zero_copy_only=False)
        return cls.from_columns(columns)


SHAPE_COLUMNS: tuple[str, ...] = tuple(COLUMN_PREFIX + field.name for field in fields(Shapes))
"""Names of the dataset columns, in the order of the fields of `Shapes`."""

NEEDED_COLUMNS: tuple[str, ...] = tuple(c for c in SHAPE_COLUMNS if c.removeprefix(COLUMN_PREFIX) not in _AUDIO)
"""Those that every annotated dataset has."""
