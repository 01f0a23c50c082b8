"""What a cell of an image, a video or a sound gives to a library that opens files: a path, or an open file.

In: `{"bytes", "path"}` as `datasets` gives it undecoded, bytes, a path, an open file. Out: a path or an open file.
"""

import contextlib
import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from hf_dflop.errors import DatasetError

__all__ = ["file_source", "open_container"]


def file_source(cell: Any, *, where: str, kind: str, expected: str) -> Any:
    """A path, or something with `read` and `seek`.

    Args:
        cell (`Any`): of a dataset.
        where (`str`): what an error names.
        kind (`str`): "image", "video" or "sound".
        expected (`str`): what a cell may be, for an error.

    Raises:
        DatasetError: it is a URL, or nothing that can be opened.
    """
    source: Any = cell
    if isinstance(cell, Mapping):
        source = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(source, bytes):
        source = BytesIO(source)
    elif hasattr(source, "to_pybytes"):  # a buffer of an arrow table, read in place
        import pyarrow as pa

        source = pa.BufferReader(source)
    if isinstance(source, str) and "://" in source:
        raise DatasetError(f"{where}: {source!r} is a URL; store the {kind} in the dataset or as a local file")
    if not isinstance(source, str) and not hasattr(source, "__fspath__") and not hasattr(source, "seek"):
        a = "an" if kind == "image" else "a"
        raise DatasetError(f"{where}: {type(cell).__name__} is not {a} {kind}; expected {expected}")
    return source


def open_container(cell: Any, *, where: str, kind: str, stream: str, without: str, expected: str) -> Any:
    """The open PyAV container of a video or a sound.

    Args:
        kind (`str`): "video" or "sound".
        stream (`str`): "video" or "audio": of which it must hold one, and the extra that installs PyAV.
        without (`str`): what needs no PyAV, for an error.
        cell, where, expected: as in `file_source`.

    Raises:
        DatasetError: PyAV is not there, the file cannot be read, or it holds no such stream.
    """
    try:
        import av
    except ImportError as error:
        raise DatasetError(
            f'{where}: reading a {kind} file needs PyAV: pip install "hf_dflop[{stream}]" ({without} do without)'
        ) from error
    cell = getattr(cell, "_hf_encoded", cell)  # what datasets keeps beside a decoder
    source = file_source(cell, where=where, kind=kind, expected=expected)
    try:
        if missing := _missing_bytes(source):
            raise DatasetError(f"{where}: the file is cut off: {missing} bytes are missing")
        container = av.open(source if hasattr(source, "seek") else str(source))
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(f"{where}: the {kind} cannot be read: {error}") from error
    if not getattr(container.streams, stream):
        container.close()
        raise DatasetError(f"{where}: the file holds no {stream} stream")
    return container


def _missing_bytes(source: Any) -> int:
    """Bytes that a RIFF file (WAV, AVI) tells of and does not have; one of unknown length tells 0 or all ones."""
    with contextlib.nullcontext(source) if hasattr(source, "seek") else open(source, "rb") as file:
        head = bytes(file.read(8))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    told = int.from_bytes(head[4:], "little")
    return max(0, told + 8 - size) if head[:4] == b"RIFF" and told not in (0, 2**32 - 1) else 0
