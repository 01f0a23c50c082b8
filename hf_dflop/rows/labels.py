"""Which tokens of a sample are labels.

Two policies: "assistant" learns what assistant turns say, with their end-of-turn mark; "all" learns every token
that is neither padding nor an image. Under both, nothing that the processor inserts for an image is a label.

Inputs: character spans of the text that is learned, character offsets of the tokens. A token is a label when it
overlaps a span, so that a token which straddles the border of a turn is learned.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["POLICIES", "Span", "check_policy", "expand", "labelled"]

Span = tuple[int, int]
POLICIES = ("assistant", "all")


def check_policy(labels: str) -> None:
    """Raise `ValueError` unless `labels` is a known policy."""
    if labels not in POLICIES:
        raise ValueError(f"labels={labels!r}; expected one of {POLICIES}")


def labelled(offsets: npt.NDArray[np.int64], spans: Sequence[Span], policy: str) -> npt.NDArray[np.bool_]:
    """Which tokens are labels; `offsets` is `(num_tokens, 2)`, the result `(num_tokens,)`.

    Tokens of no width are those that the tokenizer adds by itself (BOS, EOS): labels only under "all".

    Example:
        >>> labelled(np.array([[0, 0], [0, 2], [2, 5]]), [(2, 5)], "assistant").tolist()
        [False, False, True]
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    flags = (starts == ends) if policy == "all" else np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        flags |= (starts < last) & (ends > first)
    return flags


def expand(text: str, placeholder: str, replacements: Sequence[str], spans: Sequence[Span]) -> tuple[str, list[Span]]:
    """Put the replacement of each image in place of its placeholder, and move the spans along.

    The returned spans leave out the replacements. `text` must hold one placeholder per replacement.

    Example:
        >>> expand("a@b", "@", ["<<>>"], [(0, 3)])
        ('a<<>>b', [(0, 1), (5, 6)])
    """
    pieces = text.split(placeholder)
    if len(pieces) != len(replacements) + 1:
        raise ValueError(f"{len(pieces) - 1} placeholders for {len(replacements)} replacements")
    parts, holes, position = [pieces[0]], [], len(pieces[0])
    for replacement, piece in zip(replacements, pieces[1:], strict=True):
        holes.append((position, position + len(placeholder), len(replacement) - len(placeholder)))
        position += len(placeholder) + len(piece)
        parts += [replacement, piece]
    return "".join(parts), shift_spans(spans, holes)


def shift_spans(spans: Sequence[Span], holes: Sequence[tuple[int, int, int]]) -> list[Span]:
    """Spans after each hole `(start, end)` grew by `gain` characters, without what is inside the holes."""
    starts, ends = [hole[0] for hole in holes], [hole[1] for hole in holes]
    gains = [0, *np.cumsum([hole[2] for hole in holes]).tolist()]
    moved = []
    for first, last in spans:
        inside = range(bisect.bisect_left(starts, first), bisect.bisect_left(starts, last))
        cuts = [first, *(edge for i in inside for edge in (starts[i], ends[i])), last]
        for left, right in zip(cuts[::2], cuts[1::2], strict=True):
            if left < right:
                gain = int(gains[bisect.bisect_right(ends, left)])
                moved.append((left + gain, right + gain))
    return moved


def holes_of(replacement_offsets: Sequence[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Holes from the `text_replacement_offsets` that a transformers processor returns for one text."""
    return [
        (entry["span"][0], entry["span"][1], len(entry["replacement"]) - (entry["span"][1] - entry["span"][0]))
        for entry in replacement_offsets
    ]
