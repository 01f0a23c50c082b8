"""Counts of many rows as an arrow file that is mapped into memory, not held in it.

The file is one that `datasets` maps by itself: a stream of one record batch, so that each column lies in one piece
and numpy reads it in place. What else is to be kept with the counts is JSON in the metadata of its schema.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hf_dflop.shapes import SHAPE_COLUMNS

if TYPE_CHECKING:
    from datasets.table import MemoryMappedTable

__all__ = ["counts_folder", "read_counts", "staged_counts", "write_counts"]

_KEPT = b"hf_dflop"


def counts_folder() -> Path:
    """Where counts lie: in the cache of `datasets`; with its caching off, where they end with the process."""
    import datasets

    if datasets.is_caching_enabled():
        return Path(datasets.config.HF_DATASETS_CACHE) / "hf_dflop"
    return Path(datasets.fingerprint.get_temporary_cache_files_directory()) / "hf_dflop"


@contextmanager
def staged_counts(num_rows: int) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
    """Columns of zeros to be filled, `(num_rows,)` each, in a file without a name: it is gone when it is closed."""
    folder = counts_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(len(SHAPE_COLUMNS) * num_rows * 8)
        values = np.memmap(file, dtype=np.int64, mode="r+", shape=(len(SHAPE_COLUMNS), num_rows))
        yield dict(zip(SHAPE_COLUMNS, values, strict=True))


def write_counts(path: Path, columns: Mapping[str, npt.NDArray[np.int64]], kept: Mapping[str, Any]) -> None:
    """Write columns, and what is kept with them; beside the place first, so that nobody reads a half-written file."""
    import pyarrow as pa

    batch = pa.record_batch([pa.array(np.asarray(values)) for values in columns.values()], names=list(columns))
    batch = batch.replace_schema_metadata({_KEPT: json.dumps(dict(kept))})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.unfinished")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    unfinished.replace(path)


def read_counts(path: Path) -> "tuple[MemoryMappedTable, dict[str, Any]]":
    """The mapped table of a file, and what is kept with it."""
    from datasets.table import MemoryMappedTable

    table = MemoryMappedTable.from_file(str(path))
    return table, json.loads(table.table.schema.metadata[_KEPT])
