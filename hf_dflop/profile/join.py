"""Counts → columns of the dataset, without copying its rows."""

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hf_dflop.profile.annotate import ERROR_COLUMN
from hf_dflop.profile.counts_file import counts_folder, read_counts, staged_counts, write_counts
from hf_dflop.profile.origin import with_annotation
from hf_dflop.shapes import COLUMN_PREFIX, SHAPE_COLUMNS

if TYPE_CHECKING:
    from datasets.table import MemoryMappedTable, TableBlock

__all__ = ["join_columns"]


def join_columns(
    data: Any, counts: "TableBlock", record: dict[str, Any], reasons: Mapping[int, str] | None = None
) -> Any:
    """The dataset with the columns added, without copying its rows; the given dataset is left as it is.

    Args:
        data (`Dataset`): the rows.
        counts (`TableBlock`): their counts, in the order of the rows.
        record (`dict`): what the counts were made with.
        reasons (`Mapping[int, str]`, *optional*): bad rows, for the column `dflop_error`; there is none without.
    """
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, concat_tables

    dropped = [column for column in data.column_names if column.startswith(COLUMN_PREFIX)]
    plain = data.remove_columns(dropped)
    marks = [] if reasons is None else [sorted(reasons)]
    origin = json.dumps([plain._fingerprint, record, *marks], sort_keys=True).encode()
    fingerprint = hashlib.sha256(origin).hexdigest()[:16]
    where = None
    if plain._indices is not None:
        where = plain._indices.column("indices").to_numpy()
        counts = _scattered(counts, where, len(plain.data), fingerprint)
    # Rows in memory get columns of the same kind: map() keeps its cache beside the first file that a dataset maps.
    added = [counts if plain.cache_files else InMemoryTable(counts.table)]
    types = {name: datasets.Value("int64") for name in SHAPE_COLUMNS}
    if reasons is not None:
        marked = {int(index if where is None else where[index]): reason for index, reason in reasons.items()}
        column = pa.array((marked.get(i) for i in range(len(plain.data))), type=pa.string(), size=len(plain.data))
        added.append(InMemoryTable(pa.table({ERROR_COLUMN: column})))
        types[ERROR_COLUMN] = datasets.Value("string")
    info = copy.deepcopy(plain.info)
    info.features = datasets.Features({**plain.features, **types})
    info.description = with_annotation(info.description, record)
    annotated = datasets.Dataset(
        concat_tables([plain.data, *added], axis=1),
        info=info,
        split=plain.split,
        indices_table=plain._indices,
        fingerprint=fingerprint,
    )
    form = plain.format
    if form["type"] is not None:
        names = form["columns"] if set(form["columns"]) != set(plain.column_names) else None
        annotated.set_format(form["type"], names, form["output_all_columns"], **form["format_kwargs"])
    return annotated


def _scattered(
    counts: "TableBlock", where: npt.NDArray[np.int64], num_rows: int, fingerprint: str
) -> "MemoryMappedTable":
    """Under a select or shuffle, row i lies at table row `where[i]`; rows that are not selected stay 0, unseen."""
    path = counts_folder() / f"{fingerprint}.placed.arrow"
    # Written each time: the counts may be another version's of transformers, which the fingerprint does not tell.
    with staged_counts(num_rows) as columns:
        for name, values in columns.items():
            values[where] = counts.column(name).to_numpy()
        write_counts(path, columns, {})
    return read_counts(path)[0]
