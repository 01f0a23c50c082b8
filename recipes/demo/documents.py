"""Turns help pages into a dataset of interleaved text and images.

Decides what one training sample is: a section of a page. The user turn asks for it by its titles, the assistant
turn is the section itself, with each figure where the page has it. Sections under `join_chars` without a figure
are joined with the section after them; a piece over `max_chars` or `max_images` is split between blocks (a block
over the limit between words); what is then under `min_chars` and has no figure is dropped. Nothing else is
evened out: lengths and numbers of images keep the heavy tail of the source.

In: a folder of HTML pages with their images. Out: a `DatasetDict` with "train" and "eval", divided by page, with
the columns `id`, `page`, `images` (bytes embedded) and `messages`, the same on every run.
"""

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk

from .html_pages import Block, Page, read_page

__all__ = ["DocumentLimits", "build_documents", "describe", "load_documents", "pieces_of", "split_pages"]

FOLDER = "documents"
_STAMP = "documents.json"

FEATURES = Features(
    {
        "id": Value("string"),
        "page": Value("string"),
        "images": List(Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLimits:
    """How a page is cut into samples, and which pages are held out."""

    max_chars: int = 1400
    """Longest text of the assistant turn of one sample, in characters (about 350 tokens): short enough for old CPUs,
    where a token of a whole vocabulary's logits takes 6 ms, and still five times the mean sample."""
    max_images: int = 5
    """Most figures of one sample."""
    min_chars: int = 40
    """A sample without a figure needs at least this much text."""
    join_chars: int = 40
    """A section without a figure and under this length is joined with the next one of its page."""
    eval_fraction: float = 0.1
    """Share of the *pages* that are held out."""
    seed: int = 0
    """Of the choice of pages that are held out, and of the order of the samples."""

    def __post_init__(self) -> None:
        if self.max_chars < max(self.min_chars, self.join_chars) or self.max_images < 1:
            raise ValueError(
                f"max_chars={self.max_chars}, max_images={self.max_images}: max_chars must be at least min_chars "
                f"({self.min_chars}) and join_chars ({self.join_chars}), and max_images at least 1"
            )
        if not 0.0 < self.eval_fraction < 1.0:
            raise ValueError(f"eval_fraction is {self.eval_fraction}; it must lie between 0 and 1")


def pieces_of(page: Page, limits: DocumentLimits) -> list[tuple[str, list[Block]]]:
    """Cuts a page into pieces, in reading order; each is (user prompt, blocks)."""
    pieces: list[tuple[str, list[Block]]] = []
    for section in _joined(_sections(page.blocks), limits.join_chars):
        heading = next((block.text for block in section if block.kind == "heading"), page.title)
        where = (
            f"help page ‘{page.title}’"
            if heading == page.title
            else f"section ‘{heading}’ of the help page ‘{page.title}’"
        )
        parts = [part for part in _split(section, limits) if _is_enough(part, limits)]
        for i, part in enumerate(parts):
            pieces.append((f"Write the {where}." if i == 0 else f"Continue the {where}.", part))
    return pieces


def split_pages(names: Iterable[str], *, eval_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Divides page names into (train, eval); at least one page is held out. Does not depend on their order."""
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    num_eval = max(1, round(eval_fraction * len(shuffled)))
    return sorted(shuffled[num_eval:]), sorted(shuffled[:num_eval])


def build_documents(help_folder: Path, *, limits: DocumentLimits | None = None) -> DatasetDict:
    """Reads every page under `help_folder` and builds the two splits.

    Args:
        help_folder: Root of the HTML help tree.
        limits: How pages are cut and divided; the defaults where None.

    Returns:
        "train" in a seeded order of samples, "eval" in reading order.
    """
    limits = limits or DocumentLimits()
    pages = [read_page(path, help_folder) for path in sorted(help_folder.rglob("*.html"))]
    rows_of = {page.name: list(_rows(page, limits)) for page in pages if page is not None}
    rows_of = {name: rows for name, rows in rows_of.items() if rows}
    if len(rows_of) < 2:
        raise ValueError(
            f"{help_folder} has {len(rows_of)} usable HTML pages; at least 2 are needed to hold one out. "
            "Check that the help tree was unpacked there."
        )
    train, held_out = split_pages(rows_of, eval_fraction=limits.eval_fraction, seed=limits.seed)
    train_rows = [row for name in train for row in rows_of[name]]
    random.Random(limits.seed + 1).shuffle(train_rows)
    eval_rows = [row for name in held_out for row in rows_of[name]]
    return DatasetDict(
        {
            "train": Dataset.from_list(train_rows, features=FEATURES),
            "eval": Dataset.from_list(eval_rows, features=FEATURES),
        }
    )


def load_documents(cache: Path, *, limits: DocumentLimits | None = None, verbose: bool = True) -> DatasetDict:
    """The documents of `cache`, built on the first call and whenever the limits or the source changed.

    Args:
        cache: The folder that [`~recipes.demo.fetch.fetch`] filled; the dataset is saved in it.
        limits: How pages are cut and divided.
        verbose: Whether to print the statistics after building.
    """
    from .fetch import fetch

    limits = limits or DocumentLimits()
    fetched = fetch(cache)
    stamp = {"limits": asdict(limits), "source": fetched.source, "format": 1}
    folder = Path(cache) / FOLDER
    if _read_json(folder / _STAMP) != stamp:
        print(f"[demo] building the documents from {fetched.source}", flush=True)
        documents = build_documents(fetched.help_folder, limits=limits)
        partial = folder.with_name(FOLDER + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        documents.save_to_disk(str(partial))
        (partial / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        if verbose:
            print(describe(documents))
    return load_from_disk(str(folder))


def describe(documents: DatasetDict) -> str:
    """A few lines on both splits: samples, images per sample, characters per sample, share without images."""
    quantiles = (0, 25, 50, 75, 95, 99, 100)
    lines = []
    for name, split in documents.items():
        num_images = np.array([len(images) for images in split.with_format("arrow")["images"].to_pylist()])
        num_chars = np.array([_num_chars(messages) for messages in split["messages"]])
        lines.append(
            f"[demo] {name}: {len(split)} samples of {len(set(split['page']))} pages, {num_images.sum()} images, "
            f"{100 * np.mean(num_images == 0):.0f} % text only\n"
            f"[demo]   quantiles {'/'.join(map(str, quantiles))} %: images per sample "
            f"{_quantiles(num_images, quantiles)} (mean {num_images.mean():.2f}), characters "
            f"{_quantiles(num_chars, quantiles)} (mean {num_chars.mean():.0f})"
        )
    return "\n".join(lines)


def _sections(blocks: Iterable[Block]) -> list[list[Block]]:
    sections: list[list[Block]] = []
    for block in blocks:
        if block.kind == "heading" or not sections:
            sections.append([])
        sections[-1].append(block)
    return sections


def _joined(sections: list[list[Block]], join_chars: int) -> list[list[Block]]:
    """Short sections without a figure go in front of the next one, at the page's end behind the last."""
    joined: list[list[Block]] = []
    waiting: list[Block] = []
    for section in sections:
        waiting = waiting + section
        if _text_length(waiting) >= join_chars or _num_images(waiting):
            joined.append(waiting)
            waiting = []
    if waiting and joined:
        joined[-1] = joined[-1] + waiting
    elif waiting:
        joined.append(waiting)
    return joined


def _split(blocks: list[Block], limits: DocumentLimits) -> list[list[Block]]:
    """Parts within the limits, in order and of about equal length. A heading goes with the block after it."""
    num_parts = max(1, math.ceil(_text_length(blocks) / limits.max_chars))
    # A fifth above the even share, so that blocks of unlike length still come out in `num_parts` parts.
    max_chars = min(limits.max_chars, math.ceil(1.2 * _text_length(blocks) / num_parts))
    parts: list[list[Block]] = [[]]
    for block in blocks:
        for item in _cut(block, max_chars):
            if _text_length([*parts[-1], item]) > max_chars or _num_images([*parts[-1], item]) > limits.max_images:
                headings = _trailing_headings(parts[-1])
                del parts[-1][len(parts[-1]) - len(headings) :]
                if _text_length([*headings, item]) > max_chars:
                    parts.append(headings)
                    headings = []
                parts.append([*headings, item])
            else:
                parts[-1].append(item)
    return [part for part in parts if part]


def _trailing_headings(blocks: list[Block]) -> list[Block]:
    return list(reversed(list(itertools.takewhile(lambda block: block.kind == "heading", reversed(blocks)))))


def _cut(block: Block, max_chars: int) -> Iterator[Block]:
    """The block itself, or pieces of at most `max_chars` characters cut after a sentence or else a word."""
    text = block.text
    while len(text) > max_chars:
        ends = [match.end() for match in re.finditer(r"[.!?]\s", text[: max_chars + 1])]
        if not ends or ends[-1] < max_chars // 2:
            ends = [match.end() for match in re.finditer(r"\s", text[:max_chars])]
        end = ends[-1] if ends else max_chars
        yield Block(kind=block.kind, text=text[:end].strip(), level=block.level)
        text = text[end:].strip()
    if text or block.kind == "image":
        yield Block(kind=block.kind, text=text, level=block.level, image=block.image)


def _text_length(blocks: Iterable[Block]) -> int:
    return sum(len(block.text) for block in blocks)


def _num_images(blocks: Iterable[Block]) -> int:
    return sum(block.kind == "image" for block in blocks)


def _is_enough(blocks: list[Block], limits: DocumentLimits) -> bool:
    body = [block for block in blocks if block.kind != "heading"]
    return _num_images(body) > 0 or (bool(body) and _text_length(blocks) >= limits.min_chars)


def _rows(page: Page, limits: DocumentLimits) -> Iterator[dict[str, Any]]:
    for i, (prompt, blocks) in enumerate(pieces_of(page, limits)):
        yield {
            "id": f"{page.name}#{i}",
            "page": page.name,
            "images": [{"bytes": block.image.read_bytes(), "path": None} for block in blocks if block.image],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": prompt}]},
                {"role": "assistant", "content": _content(blocks)},
            ],
        }


def _content(blocks: Iterable[Block]) -> list[dict[str, str | None]]:
    """Content parts in reading order: a line for each block, and neighbouring texts in one part."""
    content: list[dict[str, str | None]] = []
    line_open = False
    for block in blocks:
        text = "\n" * line_open + block.text
        line_open = True
        if block.kind == "text" or block.kind == "heading":
            if content and content[-1]["type"] == "text":
                content[-1]["text"] = f"{content[-1]['text']}{text}"
            else:
                content.append({"type": "text", "text": text})
            continue
        if text and content[-1]["type"] == "text":  # the line break before a figure belongs to the text
            content[-1]["text"] = f"{content[-1]['text']}{text}"
        content.append({"type": "image", "text": None})
    return content


def _num_chars(messages: list[dict[str, Any]]) -> int:
    return sum(len(part["text"] or "") for message in messages for part in message["content"])


def _quantiles(values: np.ndarray, quantiles: tuple[int, ...]) -> str:
    return "/".join(f"{value:.0f}" for value in np.percentile(values, quantiles))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
