"""Does an encoded image look cut off? Told from its last bytes, so that whole files are never decoded for it.

Input: the format that PIL recognised and the open file. Output: whether to decode it and see. A file that ends as
its format says is taken to be whole; one that does not may still be readable, and only decoding tells.

Assumptions: damage inside the file, with an intact end, is not noticed here. Formats that are not listed are taken
to be whole.
"""

import os
from typing import Any

__all__ = ["looks_cut_off"]

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


def looks_cut_off(format: str | None, file: Any) -> bool:
    """Whether the file ends otherwise than its format asks for. Moves the file's position."""
    if format == "WEBP":
        file.seek(4)
        told = int.from_bytes(file.read(4), "little") + 8
        return bool(file.seek(0, os.SEEK_END) < told)
    end = _ENDS.get(format or "")
    if end is None:
        return False
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(end)))
    return bool(file.read(len(end)) != end)
