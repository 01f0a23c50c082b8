"""Reads one HTML help page as an ordered list of headings, texts and figures.

In: a page of a help tree (DocBook or Sphinx output) and the images beside it. Out: a `Page`, with its blocks in
reading order, or None where the file holds no body text (indexes, search forms).

Assumptions: navigation is recognised by tag (`nav`, `footer`, ...), by the classes of the two generators and by
`role="navigation"`. A picture is a figure when it can be opened, both sides have at least `min_side` pixels and
it is no navigation icon; other pictures leave their alt text behind. Markup inside a block is not kept.
"""

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

__all__ = ["Block", "Page", "read_page"]

_ICONS = {"prev", "next", "home", "up", "note", "tip", "warning", "caution", "important"}
_SKIPPED_TAGS = {"script", "style", "nav", "footer", "header", "form", "template"}
_SKIPPED_CLASSES = {
    "navheader", "navfooter", "toc", "index", "indexdiv", "bibliography", "glossary",
    "sphinxsidebar", "related", "footer", "headerlink", "viewcode-link", "toctree-wrapper",
}  # fmt: skip
_SKIPPED_ROLES = {"navigation", "search", "contentinfo"}
_SKIPPED_PAGES = re.compile(r"genindex|search|py-modindex|ix\d+|_modules|_sources|_static")
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = {
    "p", "div", "section", "article", "main", "ul", "ol", "li", "dl", "dt", "dd", "table", "thead", "tbody",
    "tr", "td", "th", "caption", "pre", "blockquote", "figure", "figcaption", "hr", "body",
}  # fmt: skip
_VOID = {"br", "hr", "img", "meta", "link", "input", "col", "area", "base", "embed", "source", "track", "wbr"}
_NUMBERING = re.compile(r"^(?:Chapter |Appendix )?(?:\d+|[A-Z])(?:\.\d+)*\.\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One heading, text or figure of a page.

    Attributes:
        kind: "heading", "text" or "image".
        text: The text of a heading or a text block; empty for a figure.
        level: 1 to 6 for a heading, else 0.
        image: The figure's file, None for the other kinds.
    """

    kind: str
    text: str = ""
    level: int = 0
    image: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A help page: `name` is its path inside the help tree, without the suffix."""

    name: str
    title: str
    blocks: tuple[Block, ...]


class _PageParser(HTMLParser):
    """Collects blocks; what lies under a skipped element is ignored until that element closes."""

    def __init__(self, folder: Path, min_side: int, max_pixels: int) -> None:
        super().__init__(convert_charrefs=True)
        self.folder = folder
        self.min_side = min_side
        self.max_pixels = max_pixels
        self.blocks: list[Block] = []
        self.head_title = ""
        self._text: list[str] = []
        self._heading = 0
        self._skipped = ""  # tag of the skipped element we are in
        self._depth = 0  # open elements of that tag
        self._in_body = False
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if self._skipped:
            self._depth += tag == self._skipped
            return
        if tag == "title" and not self._in_body:
            self._in_title = True
        self._in_body = self._in_body or tag == "body"
        if tag not in _VOID and self._is_navigation(tag, values):
            self._flush()
            self._skipped, self._depth = tag, 1
        elif tag == "img":
            self._picture(values)
        elif tag == "br":
            self._text.append(" ")
        elif tag in _HEADINGS:
            self._flush()
            self._heading = _HEADINGS[tag]
        elif tag in _BLOCKS:
            self._flush()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            if self._depth == 0:
                self._skipped = ""
        elif tag == "title":
            self._in_title = False
        elif tag in _HEADINGS or tag in _BLOCKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if self._in_title:
            self.head_title += data
        elif self._in_body:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    @staticmethod
    def _is_navigation(tag: str, values: dict[str, str]) -> bool:
        return (
            tag in _SKIPPED_TAGS
            or bool(_SKIPPED_CLASSES & set(values.get("class", "").split()))
            or values.get("role") in _SKIPPED_ROLES
        )

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        level, self._heading = self._heading, 0
        self._text.clear()
        if text and level:
            self.blocks.append(Block(kind="heading", text=_NUMBERING.sub("", text), level=level))
        elif text and any(char.isalnum() for char in text):
            self.blocks.append(Block(kind="text", text=text))

    def _picture(self, values: dict[str, str]) -> None:
        source = unquote(values.get("src", "").split("#")[0].split("?")[0])
        if not source or Path(source).stem in _ICONS:
            return
        alt = " ".join(values.get("alt", "").split())
        if Path(alt).suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".svg"):
            alt = ""  # the generator put the file name there
        path = self.folder / source
        if not _is_figure(path, self.min_side, self.max_pixels):
            self._text.append(f" {alt} ")
            return
        self._flush()
        recent = " ".join(block.text for block in self.blocks[-2:])
        if alt and alt.lower() not in recent.lower():
            self.blocks.append(Block(kind="text", text=alt))
        self.blocks.append(Block(kind="image", image=path))


def _is_figure(path: Path, min_side: int, max_pixels: int) -> bool:
    try:
        with Image.open(path) as image:  # reads the header only
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
    return min(width, height) >= min_side and width * height <= max_pixels


def read_page(path: Path, root: Path, *, min_side: int = 32, max_pixels: int = 4_000_000) -> Page | None:
    """Reads one HTML file.

    Args:
        path: The HTML file.
        root: The help tree that it belongs to; the page is named by its path below it.
        min_side: Smallest width and height, in pixels, of a picture that counts as a figure.
        max_pixels: Largest area of a figure; larger pictures are left out.

    Returns:
        The page, or None where it is an index or has no blocks.
    """
    name = path.relative_to(root).with_suffix("").as_posix()
    if _SKIPPED_PAGES.search(name):
        return None
    parser = _PageParser(path.parent, min_side, max_pixels)
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    if not parser.blocks:
        return None
    headings = [block.text for block in parser.blocks if block.kind == "heading"]
    title = headings[0] if headings else _NUMBERING.sub("", " ".join(parser.head_title.split()))
    return Page(name=name, title=title or name, blocks=tuple(parser.blocks))
