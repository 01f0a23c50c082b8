"""Find out how a dataset writes its samples, and read every one as the same `Row`.

Inputs: a row (a dict) and, where there are, the features of the dataset. Output: a `Layout`, and with it each row
as messages with content parts, and lists of image, video and audio cells. Layouts are told apart by the
structure of the columns:

    messages        list of {role, content}; content is text (with `<image>` markers) or a list of parts
    conversations   list of {from, value} with `<image>` markers (LLaVA, ShareGPT)
    texts           list of {user, assistant} (the_cauldron, FineVision)
    question        a question column and an answer column
    caption         one text column: a document when it has `<image>` markers, else what is said of the images
    (a function)    row → {"messages": [...], "images": [...], "videos": [...], "audios": [...]}

Assumptions: samples have text, images, videos and sounds. Images, videos and sounds without any marker belong to the
first user turn. A row of videos alone may mark them with `<video>` or with `<image>`; a sound is marked with
`<audio>`. One line break beside a marker belongs to it, since chat templates write their own.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_dflop.errors import DatasetError
from hf_dflop.rows.audio import audio_cells
from hf_dflop.rows.turns import list_of_dicts, normalise
from hf_dflop.rows.videos import video_cells
from hf_dflop.shapes import COLUMN_PREFIX

__all__ = ["LAYOUTS", "Layout", "Row", "detect_layout", "read_row"]

LAYOUTS = ("messages", "conversations", "texts", "question", "caption")
"""Names that `layout=` takes, beside "auto" and a function."""

_TURN_KEYS = {
    "messages": ("role", "content"),
    "conversations": ("from", "value"),
    "texts": ("user", "assistant"),
}
_QUESTION_COLUMNS = ("question", "query", "prompt", "instruction", "problem")
_ANSWER_COLUMNS = ("answer", "answers", "response", "output", "completion", "solution", "label")
_CAPTION_COLUMNS = ("text", "caption", "captions", "txt")
_IMAGE_COLUMNS = ("images", "image", "img", "picture", "pictures")
_VIDEO_COLUMNS = ("videos", "video")
_AUDIO_COLUMNS = ("audios", "audio")
_AUDIO_ENDINGS = ("wav", "flac", "mp3", "ogg", "opus")
"""Columns of an archive whose members are rows (WebDataset)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample in the form that every later step reads."""

    messages: list[dict[str, Any]]
    """Turns `{"role", "content"}`; content is a list of `{"type": "text", "text"}`, `{"type": "image"}`,
    `{"type": "video"}` and `{"type": "audio"}`."""
    images: list[Any]
    """Image cells in the order of the image parts: `{"bytes", "path"}`, a path, or a PIL image."""
    videos: list[Any] = field(default_factory=list)
    """Video cells in the order of the video parts: `{"bytes", "path"}`, a path, or a list of image cells (frames)."""
    audios: list[Any] = field(default_factory=list)
    """Audio cells in the order of the audio parts: `{"bytes", "path"}`, a path, or `{"array", "sampling_rate"}`."""
    index: int | None = None
    """Row of the dataset, for error messages."""

    @property
    def name(self) -> str:
        """How error messages call this row."""
        return "the row" if self.index is None else f"row {self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where a dataset keeps the text and the images of a sample."""

    kind: str
    """One of `LAYOUTS`, or "function"."""
    text_columns: tuple[str, ...] = ()
    """Columns that hold the text."""
    image_column: str | None = None
    """Column that holds the image or the images."""
    video_column: str | None = None
    """Column that holds the video or the videos."""
    audio_column: str | None = None
    """Column that holds the sound or the sounds."""
    function: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
    """The user's own reader; it gets undecoded images when tokens are counted."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns that `read_row` looks at; `None` stands for all of them."""
        if self.function is not None:
            return None
        media = (self.image_column, self.video_column, self.audio_column)
        return self.text_columns + tuple(column for column in media if column is not None)


def detect_layout(
    row: Mapping[str, Any],
    features: Mapping[str, Any] | None = None,
    *,
    layout: str | Callable[[dict[str, Any]], Mapping[str, Any]] = "auto",
    image_column: str | None = None,
) -> Layout:
    """Recognise the layout of a dataset from one row.

    Args:
        row (`Mapping[str, Any]`): any row of the dataset.
        features (`Mapping[str, Any]`, *optional*): features of the dataset; they decide where the row has empty cells.
        layout (`str` or `Callable`, defaults to `"auto"`): one of `LAYOUTS`, or a function that maps a row to
            `{"messages": [...], "images": [...]}`.
        image_column (`str`, *optional*): column of the images, where its name or type does not tell.

    Raises:
        DatasetError: no layout fits, several do, or `image_column` is not there.

    Example:
        >>> detect_layout({"image": "cat.png", "question": "What is it?", "answer": "A cat."}).kind
        'question'
    """
    features = features or {}
    columns = [name for name in row if not name.startswith(COLUMN_PREFIX)]
    if callable(layout):
        return Layout(kind="function", function=layout)
    if layout != "auto" and layout not in LAYOUTS:
        raise DatasetError(f"unknown layout {layout!r}; expected 'auto', a function, or one of {LAYOUTS}")
    heard = _AUDIO_COLUMNS + _AUDIO_ENDINGS
    sounds = [c for c in columns if _is_column_of("audio", heard, c, row[c], features.get(c))]
    videos = [
        c for c in columns if c not in sounds and _is_column_of("video", _VIDEO_COLUMNS, c, row[c], features.get(c))
    ]
    audio, video = _one_of(sounds, _AUDIO_COLUMNS, "sounds"), _one_of(videos, _VIDEO_COLUMNS, "videos")
    columns = [name for name in columns if name not in sounds and name not in videos]
    found = _detect(row, features, columns, layout, image_column)
    return replace(found, video_column=video, audio_column=audio)


def _detect(
    row: Mapping[str, Any], features: Mapping[str, Any], columns: list[str], layout: str, image_column: str | None
) -> Layout:
    """The layout of the columns that hold text and images."""
    images = _find_image_column(row, features, columns, image_column)
    for kind, keys in _TURN_KEYS.items():
        if layout not in ("auto", kind):
            continue
        found = [c for c in columns if set(keys) <= _turn_keys(row[c], features.get(c))]
        if {"prompt", "completion"} <= set(found):
            return Layout(kind=kind, text_columns=("prompt", "completion"), image_column=images)
        if len(found) > 1 and kind not in found:
            raise DatasetError(
                f"columns {found} all hold turns; name one of them {kind!r}, or pass layout= a function that "
                'maps a row to {"messages": ..., "images": ...}'
            )
        if found:
            return Layout(kind=kind, text_columns=(kind if kind in found else found[0],), image_column=images)
    question = next((c for c in _QUESTION_COLUMNS if c in columns), None)
    answer = next((c for c in _ANSWER_COLUMNS if c in columns and c != question), None)
    if layout in ("auto", "question") and question and answer:
        return Layout(kind="question", text_columns=(question, answer), image_column=images)
    caption = next((c for c in _CAPTION_COLUMNS if c in columns), None)
    if layout in ("auto", "caption") and caption:
        return Layout(kind="caption", text_columns=(caption,), image_column=images)
    wanted = "known layout" if layout == "auto" else f"layout {layout!r}"
    raise DatasetError(
        f"the columns {columns} fit no {wanted} (messages, conversations, texts, question + answer, text or "
        'caption); pass layout= a function that maps a row to {"messages": ..., "images": ...}'
    )


def read_row(row: Mapping[str, Any], layout: Layout, *, index: int | None = None) -> Row:
    """Read a dataset row as a `Row`.

    Raises:
        DatasetError: the numbers of images (or videos) and of their placeholders differ, or a turn is not understood;
            the message names the row.

    Example:
        >>> layout = Layout(kind="caption", text_columns=("text",), image_column="image")
        >>> read_row({"text": "A cat.", "image": "cat.png"}, layout).messages[0]
        {'role': 'user', 'content': [{'type': 'image'}]}
    """
    name = "the row" if index is None else f"row {index}"
    if layout.function is not None:
        given = layout.function(dict(row))
        if not isinstance(given, Mapping) or "messages" not in given:
            raise DatasetError(
                f'{name}: the layout function returned {type(given).__name__}; expected {{"messages", "images"}}'
            )
        turns, images, videos = list(given["messages"]), _cells(given.get("images")), video_cells(given.get("videos"))
        audios = audio_cells(given.get("audios"))
    else:
        turns = _turns(row, layout, name)
        images = _cells(row.get(layout.image_column)) if layout.image_column else []
        videos = video_cells(row.get(layout.video_column)) if layout.video_column else []
        audios = audio_cells(row.get(layout.audio_column)) if layout.audio_column else []
    marked = ["image", *(["video"] if videos else []), *(["audio"] if audios else [])]
    messages, inline = normalise(turns, name, marked)
    if not messages:
        raise DatasetError(f"{name}: has no text: its turns are empty or missing")
    kinds = [part["type"] for turn in messages for part in turn["content"]]
    if videos and not images and "video" not in kinds and kinds.count("image") == len(videos):
        for turn in messages:
            turn["content"] = [{"type": "video"} if p["type"] == "image" else p for p in turn["content"]]
        kinds = ["video" if kind == "image" else kind for kind in kinds]
    cells = {"image": images, "video": videos, "audio": audios}
    has_media = images or videos or audios or kinds.count("text") < len(kinds)
    for kind, given_cells in cells.items() if has_media else ():
        placed = kinds.count(kind)
        if not given_cells and inline[kind] and len(inline[kind]) == placed:
            cells[kind] = given_cells = inline[kind]
        if not placed and given_cells:
            target = next((turn for turn in messages if turn["role"] == "user"), messages[0])
            target["content"][:0] = [{"type": kind} for _ in given_cells]
            placed = len(given_cells)
        if placed != len(given_cells):
            hint = ""
            columns = {"image": layout.image_column, "video": layout.video_column, "audio": layout.audio_column}
            if layout.function is None and columns[kind] is None:
                hint = f"; no {kind} column was found. " + _columns_hint(kind + "s", list(row))
            raise DatasetError(f"{name}: {placed} {kind} placeholders but {len(given_cells)} {kind}s{hint}")
    return Row(messages=messages, images=cells["image"], videos=cells["video"], audios=cells["audio"], index=index)


def _turns(row: Mapping[str, Any], layout: Layout, name: str) -> list[dict[str, Any]]:
    """The turns of a row as `{"role", "content"}`, content still in the dataset's own form."""
    if layout.kind == "question":
        question, answer = (_first_text(row[c], name, c) for c in layout.text_columns)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if layout.kind == "caption":
        column = layout.text_columns[0]
        text = _first_text(row[column], name, column)
        said = {"role": "assistant", "content": text}
        return [said] if "<image>" in text else [{"role": "user", "content": ""}, said]
    turns = []
    for column in layout.text_columns:
        for turn in list_of_dicts(row[column]):
            if layout.kind == "texts":
                turns.append({"role": "user", "content": turn["user"]})
                turns.append({"role": "assistant", "content": turn["assistant"]})
            elif layout.kind == "conversations":
                turns.append({"role": turn["from"], "content": turn["value"]})
            else:
                turns.append(turn)
    return turns


def _find_image_column(
    row: Mapping[str, Any], features: Mapping[str, Any], columns: Sequence[str], image_column: str | None
) -> str | None:
    if image_column is not None:
        if image_column not in columns:
            raise DatasetError(f"no image column {image_column!r}. " + _columns_hint(image_column, columns))
        return image_column
    typed = [c for c in columns if _holds(features.get(c), "Image") or _is_image_cell(row[c])]
    for name in _IMAGE_COLUMNS:
        if name in typed or (name in columns and not typed):
            return name
    if len(typed) > 1:
        raise DatasetError(
            f"columns {typed} all hold images; pass image_column=, or layout= a function that returns the images"
        )
    return typed[0] if typed else None


def _columns_hint(wanted: str, columns: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, columns, n=1, cutoff=0.5)
    return f"Columns: {list(columns)}" + (f"; did you mean image_column={close[0]!r}?" if close else "")


def _is_column_of(kind: str, names: Sequence[str], name: str, value: Any, feature: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    decoder = kind.capitalize() + "Decoder"
    return name in names or _holds(feature, kind.capitalize()) or type(value).__name__ == decoder


def _one_of(found: Sequence[str], names: Sequence[str], kind: str) -> str | None:
    """The column that is meant among those that hold videos or sounds."""
    named = [name for name in names if name in found]
    if len(found) > 1 and not named:
        raise DatasetError(f"columns {found} all hold {kind}; pass layout= a function that returns the {kind}")
    return named[0] if named else found[0] if found else None


def _holds(feature: Any, kind: str) -> bool:
    """Whether a feature is `kind`, or a list of it."""
    if isinstance(feature, list | tuple) and feature:
        feature = feature[0]
    return kind in (type(feature).__name__, type(getattr(feature, "feature", None)).__name__)


def _is_image_cell(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _is_image_cell(value[0])
    if isinstance(value, Mapping):
        return set(value) == {"bytes", "path"}
    return hasattr(value, "size") and hasattr(value, "mode") and hasattr(value, "convert")


def _turn_keys(value: Any, feature: Any) -> set[str]:
    """Keys of the items of a list column, from the feature where there is one."""
    if isinstance(feature, list | tuple) and feature:
        inner = feature[0]
    else:
        inner = getattr(feature, "feature", feature)
    if isinstance(inner, Mapping):
        return set(inner)
    if isinstance(value, Mapping):  # a struct of lists
        return set(value) if all(isinstance(items, list | tuple) for items in value.values()) else set()
    items = value if isinstance(value, list | tuple) else []
    return set(items[0]) if items and isinstance(items[0], Mapping) else set()


def _first_text(value: Any, name: str, column: str) -> str:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, str):
        raise DatasetError(
            f"{name}: column {column!r} holds {type(value).__name__}; expected text (pass layout= a function)"
        )
    return value


def _cells(value: Any) -> list[Any]:
    if value is None:
        return []
    cells = list(value) if isinstance(value, list | tuple) else [value]
    return [cell for cell in cells if cell is not None]
