"""What a cell of an image, a video or a sound gives to a library that opens files: a path, or an open file.

In: `{"bytes", "path"}` as `datasets` gives it undecoded, bytes, a path, an open file. Out: a path or an open file.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from hf_dflop.errors import DatasetError

__all__ = ["file_source"]


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
