"""Find out how a dataset writes its samples, and read every one as the same `Row`.

Inputs: a row (a dict) and, where there are, the features of the dataset. Output: a `Layout`, and with it each row
as messages with content parts and a list of image cells. Layouts are told apart by the structure of the columns:

    messages        list of {role, content}; content is text (with `<image>` markers) or a list of parts
    conversations   list of {from, value} with `<image>` markers (LLaVA, ShareGPT)
    texts           list of {user, assistant} (the_cauldron, FineVision)
    question        a question column and an answer column
    caption         one text column: a document when it has `<image>` markers, else what is said of the images
    (a function)    row → {"messages": [...], "images": [...]}

Assumptions: samples have text and images. A row with a video or a sound is refused, since its tokens are not counted;
rows beside it whose cells are empty are read. Images without any marker belong to the first user
turn. One line break beside an `<image>` marker belongs to the marker, since chat templates write their own.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_dflop.errors import DatasetError
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
_MEDIA_COLUMNS = ("videos", "video", "audios", "audio")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
_MARKER = re.compile(r"\n?<image>\n?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample in the form that every later step reads."""

    messages: list[dict[str, Any]]
    """Turns `{"role", "content"}`; content is a list of `{"type": "text", "text"}` and `{"type": "image"}`."""
    images: list[Any]
    """Image cells in the order of the image parts: `{"bytes", "path"}`, a path, or a PIL image."""
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
    media_columns: tuple[str, ...] = ()
    """Columns of videos or sounds; a row in which one is not empty is refused."""
    function: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
    """The user's own reader; it gets undecoded images when tokens are counted."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns that `read_row` looks at; `None` stands for all of them."""
        if self.function is not None:
            return None
        return self.text_columns + (() if self.image_column is None else (self.image_column,)) + self.media_columns


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
    media = tuple(c for c in columns if c in _MEDIA_COLUMNS or _is_media_feature(features.get(c)))
    columns = [name for name in columns if name not in media]
    return replace(_detect(row, features, columns, layout, image_column), media_columns=media)


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
        DatasetError: the numbers of images and of image placeholders differ, or a turn is not understood; the
            message names the row.

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
        turns, cells = list(given["messages"]), _cells(given.get("images"))
    else:
        for column in layout.media_columns:
            if row.get(column) not in (None, [], "", b""):
                raise DatasetError(
                    f"{name}: column {column!r} holds a video or a sound, whose tokens are not counted; write the "
                    "frames of a video as images, or leave such rows out (on_error='skip' does)"
                )
        turns = _turns(row, layout, name)
        cells = _cells(row.get(layout.image_column)) if layout.image_column else []
    messages, inline = _normalise(turns, name)
    if not messages:
        raise DatasetError(f"{name}: has no text: its turns are empty or missing")
    placeholders = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if not cells and inline and len(inline) == placeholders:
        cells = inline
    if not placeholders and cells:
        target = next((turn for turn in messages if turn["role"] == "user"), messages[0])
        target["content"][:0] = [{"type": "image"} for _ in cells]
        placeholders = len(cells)
    if placeholders != len(cells):
        hint = ""
        if layout.function is None and layout.image_column is None:
            hint = "; no image column was found. " + _columns_hint("images", list(row))
        raise DatasetError(f"{name}: {placeholders} image placeholders but {len(cells)} images{hint}")
    return Row(messages=messages, images=cells, index=index)


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
        for turn in _list_of_dicts(row[column]):
            if layout.kind == "texts":
                turns.append({"role": "user", "content": turn["user"]})
                turns.append({"role": "assistant", "content": turn["assistant"]})
            elif layout.kind == "conversations":
                turns.append({"role": turn["from"], "content": turn["value"]})
            else:
                turns.append(turn)
    return turns


def _normalise(turns: Iterable[Mapping[str, Any]], name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Turns with content parts, and the image cells that were written inside the parts."""
    messages, inline = [], []
    for turn in turns:
        role = _ROLES.get(str(turn.get("role", "")).lower())
        if role is None:
            raise DatasetError(f"{name}: unknown role {turn.get('role')!r}; expected one of {sorted(_ROLES)}")
        parts = []
        for part in _parts(turn.get("content"), name):
            cell = part.pop("cell", None)
            if cell is not None:
                inline.append(cell)
            parts.append(part)
        extra = {k: v for k, v in turn.items() if k not in ("role", "content") and v is not None}
        messages.append({"role": role, "content": parts, **extra})
    if not any(part["type"] == "image" for turn in messages for part in turn["content"]):
        for turn in messages:
            turn["content"] = [piece for part in turn["content"] for piece in _split_markers(part["text"])]
    return messages, inline


def _parts(content: Any, name: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    parts: list[dict[str, Any]] = []
    for part in _list_of_dicts(content):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        kind = part.get("type")
        if kind == "text":
            if part.get("text"):
                parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            cell = next((part[k] for k in ("image", "path", "url", "image_url") if part.get(k) is not None), None)
            if isinstance(cell, Mapping) and "url" in cell:
                cell = cell["url"]
            parts.append({"type": "image", "cell": cell})
        else:
            raise DatasetError(f"{name}: content part of type {kind!r}; only 'text' and 'image' parts are understood")
    return parts


def _split_markers(text: str) -> list[dict[str, Any]]:
    if "<image>" not in text:
        return [{"type": "text", "text": text}] if text else []
    pieces: list[dict[str, Any]] = []
    for position, piece in enumerate(_MARKER.split(text)):
        if position:
            pieces.append({"type": "image"})
        if piece:
            pieces.append({"type": "text", "text": piece})
    return pieces


def _find_image_column(
    row: Mapping[str, Any], features: Mapping[str, Any], columns: Sequence[str], image_column: str | None
) -> str | None:
    if image_column is not None:
        if image_column not in columns:
            raise DatasetError(f"no image column {image_column!r}. " + _columns_hint(image_column, columns))
        return image_column
    typed = [c for c in columns if _is_image_feature(features.get(c)) or _is_image_cell(row[c])]
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


def _is_image_feature(feature: Any) -> bool:
    if isinstance(feature, list | tuple) and feature:
        feature = feature[0]
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Image" or type(inner).__name__ == "Image"


def _is_media_feature(feature: Any) -> bool:
    if isinstance(feature, list | tuple) and feature:
        feature = feature[0]
    kinds = {type(feature).__name__, type(getattr(feature, "feature", None)).__name__}
    return bool(kinds & {"Video", "Audio"})


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


def _list_of_dicts(value: Any) -> list[Any]:
    """Items of a list column; datasets write a sequence of structs as a struct of lists in older files."""
    if isinstance(value, Mapping):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return list(value or [])


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
