"""Rows → the shape columns, without decoding a pixel. The function that `datasets.map` runs.

The rendered text gets the replacement of each image, video and sound with every run of image tokens folded to one, and
is tokenised once: the image token is a special token of its own, so folding a run of k removes exactly k - 1 tokens
and changes no other, whatever the text around it merges to. Only rows longer than `max_length` are tokenised in full.
"""

import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_dflop.errors import DatasetError, DflopError
from hf_dflop.profile.audio_count import AudioCount
from hf_dflop.profile.image_count import ImageCount
from hf_dflop.profile.tokenise import Tokeniser, count_tokens
from hf_dflop.profile.tokens import TokenCounter
from hf_dflop.profile.video_count import VideoCounter
from hf_dflop.rows import Layout, Rendered, Renderer, Row, image_size, read_row, video_info
from hf_dflop.rows.audio import AudioInfo, audio_info
from hf_dflop.rows.labels import Span, expand
from hf_dflop.shapes import COLUMN_PREFIX, SHAPE_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ERROR_COLUMN", "Annotator"]

ERROR_COLUMN = COLUMN_PREFIX + "error"
"""Column with the reason why a row is not usable; null where it is."""

_SUMMED = {
    "image_tiles": "tiles",
    "image_patches": "patches",
    "image_patches_sq": "patches_sq",
    "image_tokens": "image_tokens",
}
_SUMMED_AUDIO = {
    "audio_chunks": "chunks",
    "audio_frames": "frames",
    "audio_frames_sq": "frames_sq",
    "audio_tokens": "audio_tokens",
}
_NOTHING = dict.fromkeys(("num_images", *_SUMMED, "num_audios", "audio_ms", *_SUMMED_AUDIO), 0)
"""Of a row of text alone."""
_NO_COUNTS = dict.fromkeys((name.removeprefix(COLUMN_PREFIX) for name in SHAPE_COLUMNS), 0)
"""Of a row that is not usable."""


class Annotator:
    """Counts the rows of a dataset; call it with a batch as `datasets.map` does in the arrow format."""

    def __init__(
        self,
        counter: TokenCounter,
        layout: Layout,
        labels: str = "assistant",
        max_length: int | None = None,
        *,
        raises: bool = True,
    ) -> None:
        self.counter = counter
        self.layout = layout
        self.max_length = max_length
        self.raises = raises
        self.renderer = Renderer(counter.processor, labels)
        self.tokenise = Tokeniser(counter.processor.tokenizer)
        self._videos = VideoCounter(counter)

    def __call__(self, table: "pa.Table", indices: Sequence[int]) -> dict[str, list[Any]]:
        # A batch makes many small objects and no cycles; the collector would look through the whole heap for them.
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._columns(self.count_all(self._read(table, indices)))
        finally:
            if collects:
                gc.enable()

    def annotate(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """The columns for rows that are Python values, images undecoded; what a stream gives."""
        return self._columns(self.count_all([self._row(row, index) for row, index in zip(rows, indices, strict=True)]))

    def count_all(self, rows: Sequence[Row | DflopError]) -> list[dict[str, int] | DflopError]:
        """The counts of each row, or why it is not usable; a bad row does not touch the others.

        Raises:
            DatasetError: with `raises`, a row is not usable; of several, the first.
        """
        usable = [row for row in rows if isinstance(row, Row)]
        counted: list[dict[str, int] | DflopError]
        try:
            counted = list(self.count(usable)) if usable else []
        except MemoryError:
            raise
        except Exception as error:
            counted = [_said(error, usable[0].name)] if len(usable) == 1 else [self._alone(row) for row in usable]
        following = iter(counted)
        results = [next(following) if isinstance(row, Row) else row for row in rows]
        if self.raises:
            for result in results:
                if isinstance(result, DflopError):
                    raise result
        return results

    def _alone(self, row: Row) -> dict[str, int] | DflopError:
        try:
            return self.count([row])[0]
        except Exception as error:
            return _said(error, row.name)

    def _columns(self, counted: Sequence[dict[str, int] | DflopError]) -> dict[str, list[Any]]:
        counts = [_NO_COUNTS if isinstance(row, DflopError) else row for row in counted]
        columns: dict[str, list[Any]] = {COLUMN_PREFIX + name: [row[name] for row in counts] for name in _NO_COUNTS}
        columns[ERROR_COLUMN] = [str(row) if isinstance(row, DflopError) else None for row in counted]
        return columns

    def _read(self, table: "pa.Table", indices: Sequence[int]) -> list[Row | DflopError]:
        try:
            columns = [self._values(name, table.column(name)) for name in table.column_names]
        except Exception as error:  # text that is not UTF-8, found when a column becomes Python values
            if len(indices) == 1:
                return [_said(error, f"row {indices[0]}")]
            return [row for i, index in enumerate(indices) for row in self._read(table.slice(i, 1), [index])]
        return [
            self._row(dict(zip(table.column_names, values, strict=True)), index)
            for index, values in zip(indices, zip(*columns, strict=True), strict=True)
        ]

    def _row(self, row: Mapping[str, Any], index: int) -> Row | DflopError:
        try:
            return read_row(row, self.layout, index=index)
        except Exception as error:
            return _said(error, f"row {index}")

    def _values(self, name: str, column: "pa.ChunkedArray") -> list[Any]:
        """Python values of a column; bytes of images, videos and sounds stay in the table and are read there."""
        import pyarrow as pa

        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        cell = kind.value_type if is_list else kind
        media = (self.layout.image_column, self.layout.video_column, self.layout.audio_column)
        if name not in media or not pa.types.is_struct(cell) or cell.get_field_index("bytes") < 0:
            return column.to_pylist()
        return [row for chunk in column.chunks for row in (_image_lists(chunk) if is_list else _image_cells(chunk))]

    def count(self, rows: Sequence[Row]) -> list[dict[str, int]]:
        """The counts of each row, by the field names of `Shapes`.

        Raises:
            DatasetError: an image cannot be read or processed, or `max_length` would cut one; names the row.
        """
        images = [self._images(row) if row.images else [] for row in rows]
        videos = [self._clips(row) if row.videos else [] for row in rows]
        infos = [self._infos(row) if row.audios else [] for row in rows]
        sounds = [self._sounds(row, told) if told else [] for row, told in zip(rows, infos, strict=True)]
        rendered = [self._prepared(self.renderer(row), row) for row in rows]
        folded = [
            self._expanded(
                text, [part.folded for part in parts], [part.folded for part in clips], [part.folded for part in heard]
            )
            for text, parts, clips, heard in zip(rendered, images, videos, sounds, strict=True)
        ]
        tokens = self.tokenise([text for text, _ in folded], [text.add_special_tokens for text in rendered])
        spans = [spans for _, spans in folded]
        counted = count_tokens(tokens, spans, self.renderer.labels, self.renderer.feature_ids)
        results = []
        for row, given, clips, heard, told, text, (length, features, labels) in zip(
            rows, images, videos, sounds, infos, rendered, counted.tolist(), strict=True
        ):
            parts = [*given, *clips]
            if features != sum(len(part.runs) for part in (*parts, *heard)):
                image = getattr(self.counter.token, "feature", None)
                raise DatasetError(
                    f"{row.name}: the text itself contains the image token {image!r}"
                    + ("" if self.renderer.video_token is None else ", or the token of a video")
                    + ("" if self.renderer.audio_token is None else ", or the token of a sound")
                )
            counts = _NOTHING | {"text_tokens": length - features, "label_tokens": labels}
            if parts:
                counts |= {field: sum(getattr(part, name) for part in parts) for field, name in _SUMMED.items()}
                counts["num_images"] = len(parts)
            if heard:
                counts |= {field: sum(getattr(part, name) for part in heard) for field, name in _SUMMED_AUDIO.items()}
                counts |= {"num_audios": len(heard), "audio_ms": sum(round(1000 * info.duration_s) for info in told)}
            if text.suffix is not None:
                self._add_suffix(counts, text.suffix)
            if self.max_length is not None and _length(counts) > self.max_length:
                self._cut(counts, row, text, (given, clips, heard))
            results.append(counts)
        return results

    def _images(self, row: Row) -> list[ImageCount]:
        if self.counter.token is None:
            return []  # the renderer refuses the row, and says why
        column = "" if self.layout.image_column is None else f", column {self.layout.image_column!r}"
        sizes = [image_size(cell, where=f"{row.name}{column}, image {i}") for i, cell in enumerate(row.images)]
        try:
            return self.counter.count(sizes)
        except DflopError:
            raise
        except Exception as error:
            raise DatasetError(
                f"{row.name}{column}: the processor refuses an image among {[(w, h) for h, w in sizes]} "
                f"(width, height): {error}"
            ) from error

    def _clips(self, row: Row) -> list[ImageCount]:
        if self.renderer.video_token is None:
            return []  # the renderer refuses the row, and says why
        column = "" if self.layout.video_column is None else f", column {self.layout.video_column!r}"
        infos = [video_info(cell, where=f"{row.name}{column}, video {i}") for i, cell in enumerate(row.videos)]
        try:
            return self._videos.count(infos)
        except DflopError as error:
            raise type(error)(f"{row.name}{column}: {error}") from error

    def _infos(self, row: Row) -> list[AudioInfo]:
        column = "" if self.layout.audio_column is None else f", column {self.layout.audio_column!r}"
        return [audio_info(cell, where=f"{row.name}{column}, sound {i}") for i, cell in enumerate(row.audios)]

    def _sounds(self, row: Row, infos: Sequence[AudioInfo]) -> list[AudioCount]:
        if self.counter.audio is None:
            return []  # the renderer refuses the row, and says why
        try:
            return self.counter.audio.count(infos)
        except DflopError as error:
            raise type(error)(f"{row.name}: {error}") from error

    def _expanded(
        self, text: Rendered, images: Sequence[str], videos: Sequence[str], sounds: Sequence[str]
    ) -> tuple[str, list[Span]]:
        """Text and spans with the replacements in place; none holds a placeholder of another kind."""
        full, spans = text.text, text.spans
        if images:
            full, spans = expand(full, self.counter.token.placeholder, images, spans)
        if videos and self.renderer.video_token is not None:
            full, spans = expand(full, self.renderer.video_token.placeholder, videos, spans)
        if sounds and self.renderer.audio_token is not None:
            full, spans = expand(full, self.renderer.audio_token.placeholder, sounds, spans)
        return full, spans

    def _prepared(self, text: Rendered, row: Row) -> Rendered:
        """PaliGemma moves BOS behind the image; its own method does it, on pictures of one pixel."""
        if text.suffix is None:
            return text
        from PIL import Image

        pictures = [[Image.new("RGB", (1, 1)) for _ in row.images]]
        prepared = self.counter.processor.prepare_inputs_layout(images=pictures, text=[text.text])[1]
        spans = [(0, len(prepared[0]))] if self.renderer.labels == "all" else []
        return Rendered(text=prepared[0], spans=spans, suffix=text.suffix)

    def _add_suffix(self, counts: dict[str, int], suffix: str) -> None:
        tokenizer = self.counter.processor.tokenizer
        ids = tokenizer(suffix + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        counts["label_tokens"] += len(ids)
        counts["text_tokens"] += len(ids)

    def _cut(
        self,
        counts: dict[str, int],
        row: Row,
        text: Rendered,
        media: tuple[Sequence[ImageCount], Sequence[ImageCount], Sequence[AudioCount]],
    ) -> None:
        """Count a row that is longer than `max_length`, as the tokenizer cuts it."""
        assert self.max_length is not None
        length = _length(counts)
        advice = f"{row.name}: {length} tokens, more than max_length={self.max_length}; "
        if text.suffix is not None:
            raise DatasetError(advice + "prompt and suffix are not cut, so drop the row or raise max_length")
        full, spans = self._expanded(text, *([part.replacement for part in parts] for parts in media))
        kept = self.tokenise.cut(full, text.add_special_tokens, self.max_length)
        ((num_kept, features, labels),) = count_tokens(
            [kept], [spans], self.renderer.labels, self.renderer.feature_ids
        ).tolist()
        needed = counts["image_tokens"] + counts["audio_tokens"]
        if features != needed:
            raise DatasetError(
                advice + f"the cut would keep {features} of {needed} {'audio' if row.audios else 'image'} tokens, and "
                "images, videos and sounds cannot be cut: drop the row or raise max_length"
            )
        counts |= {"text_tokens": num_kept - features, "label_tokens": labels}


def _length(counts: Mapping[str, int]) -> int:
    return counts["text_tokens"] + counts["image_tokens"] + counts["audio_tokens"]


def _said(error: Exception, name: str) -> DflopError:
    """The error as one that names the row."""
    if isinstance(error, DflopError):
        return error
    return DatasetError(f"{name}: cannot be read: {type(error).__name__}: {error}")


def _image_lists(lists: "pa.ListArray") -> list[list[Any] | None]:
    """The image cells of each row of a column of lists."""
    if not len(lists):
        return []
    first, *ends = lists.offsets.to_pylist()
    cells = _image_cells(lists.values.slice(first, ends[-1] - first))
    starts = [0, *(end - first for end in ends[:-1])]
    return [
        cells[start : end - first] if is_valid else None
        for start, end, is_valid in zip(starts, ends, lists.is_valid().to_pylist(), strict=True)
    ]


def _image_cells(images: "pa.StructArray") -> list[dict[str, Any] | None]:
    """Image cells whose bytes are slices of the table's own memory: a scalar of arrow would copy the whole file."""
    import pyarrow as pa

    fields = dict(zip((field.name for field in images.type), images.flatten(), strict=True))
    paths = fields["path"].to_pylist() if "path" in fields else [None] * len(images)
    encoded = fields["bytes"]
    if not pa.types.is_binary(encoded.type) and not pa.types.is_large_binary(encoded.type):
        contents: list[Any] = encoded.to_pylist()
    else:
        _, positions, data = encoded.buffers()
        width = np.int64 if pa.types.is_large_binary(encoded.type) else np.int32
        ends = np.frombuffer(positions, dtype=width)[encoded.offset : encoded.offset + len(encoded) + 1].tolist()
        contents = [
            data.slice(start, end - start) if is_valid else None
            for start, end, is_valid in zip(ends[:-1], ends[1:], encoded.is_valid().to_pylist(), strict=True)
        ]
    return [
        {"bytes": content, "path": path} if is_valid else None
        for content, path, is_valid in zip(contents, paths, images.is_valid().to_pylist(), strict=True)
    ]
