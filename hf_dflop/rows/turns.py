"""Turns as a dataset writes them → turns with content parts.

In: `{"role", "content"}` whose content is text, with markers such as `<image>`, or a list of parts. Out: turns whose
content is a list of `{"type": "text", "text"}`, `{"type": "image"}`, `{"type": "video"}` and `{"type": "audio"}`, and
the cells that were written inside the parts.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_dflop.errors import DatasetError

__all__ = ["list_of_dicts", "normalise"]

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
_KINDS = ("image", "video", "audio")


def normalise(
    turns: Iterable[Mapping[str, Any]], name: str, marked: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Turns with content parts, and the image, video and audio cells that were written inside the parts."""
    messages: list[dict[str, Any]] = []
    inline: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    for turn in turns:
        role = _ROLES.get(str(turn.get("role", "")).lower())
        if role is None:
            raise DatasetError(f"{name}: unknown role {turn.get('role')!r}; expected one of {sorted(_ROLES)}")
        parts = []
        for part in _parts(turn.get("content"), name):
            cell = part.pop("cell", None)
            if cell is not None:
                inline[part["type"]].append(cell)
            parts.append(part)
        message: dict[str, Any] = {"role": role, "content": parts}
        if len(turn) > 2:
            message |= {k: v for k, v in turn.items() if k not in message and v is not None}
        messages.append(message)
    if all(part["type"] == "text" for turn in messages for part in turn["content"]):
        for turn in messages:
            turn["content"] = [piece for part in turn["content"] for piece in _split(part["text"], marked)]
    return messages, inline


def _parts(content: Any, name: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    parts: list[dict[str, Any]] = []
    for part in list_of_dicts(content):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        kind = part.get("type")
        if kind == "text":
            if part.get("text"):
                parts.append({"type": "text", "text": part["text"]})
        elif isinstance(kind, str) and kind.removesuffix("_url") in _KINDS:
            kind = kind.removesuffix("_url")
            keys = (kind, "path", "url", f"{kind}_url")
            cell = next((part[k] for k in keys if part.get(k) is not None), None)
            if isinstance(cell, Mapping) and "url" in cell:
                cell = cell["url"]
            asked = [k for k, v in part.items() if v is not None and k not in ("type", "text", *_KINDS, *keys)]
            if kind == "video" and asked:
                raise DatasetError(
                    f"{name}: a video part asks for {asked[0]}={part[asked[0]]!r} of its own, which processors do not "
                    "read; set it on processor.video_processor"
                )
            parts.append({"type": kind, "cell": cell})
        else:
            raise DatasetError(
                f"{name}: content part of type {kind!r}; only text, image, video and audio parts are understood"
            )
    return parts


@functools.cache
def _markers(kinds: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\n?<({'|'.join(kinds)})>\n?")


def _split(text: str, marked: Sequence[str]) -> list[dict[str, Any]]:
    """Text with its markers taken out, each a part of its own; of a row without videos, `<video>` is text."""
    if "<" not in text:
        return [{"type": "text", "text": text}] if text else []
    pieces: list[dict[str, Any]] = []
    for position, piece in enumerate(_markers(tuple(marked)).split(text)):
        if position % 2:
            pieces.append({"type": piece})
        elif piece:
            pieces.append({"type": "text", "text": piece})
    return pieces


def list_of_dicts(value: Any) -> list[Any]:
    """Items of a list column; datasets write a sequence of structs as a struct of lists in older files."""
    if isinstance(value, Mapping):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return list(value or [])
