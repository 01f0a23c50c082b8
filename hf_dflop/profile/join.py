"""Counts → columns of the dataset, without copying its rows."""

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_dflop.profile.annotate import ERROR_COLUMN
from hf_dflop.profile.origin import with_annotation
from hf_dflop.shapes import COLUMN_PREFIX, SHAPE_COLUMNS, Shapes

__all__ = ["join_columns"]


def join_columns(data: Any, shapes: Shapes, record: dict[str, Any], reasons: Mapping[int, str] | None = None) -> Any:
    """The dataset with the columns added, without copying its rows; the given dataset is left as it is."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, concat_tables

    dropped = [column for column in data.column_names if column.startswith(COLUMN_PREFIX)]
    plain = data.remove_columns(dropped)
    columns: dict[str, Any] = dict(shapes.to_columns())
    where = np.arange(len(shapes))
    if plain._indices is not None:
        # Under a select or shuffle, row i lies at table row indices[i]; rows that are not selected stay 0, unseen.
        where = plain._indices.column("indices").to_numpy()
        scattered = {name: np.zeros(len(plain.data), np.int64) for name in columns}
        for name, values in columns.items():
            scattered[name][where] = values
        columns = scattered
    arrays = {name: pa.array(values) for name, values in columns.items()}
    types = {name: datasets.Value("int64") for name in SHAPE_COLUMNS}
    if reasons is not None:
        marked = {int(where[index]): reason for index, reason in reasons.items()}
        arrays[ERROR_COLUMN] = pa.array([marked.get(i) for i in range(len(plain.data))], type=pa.string())
        types[ERROR_COLUMN] = datasets.Value("string")
    added = InMemoryTable(pa.table(arrays))
    info = copy.deepcopy(plain.info)
    info.features = datasets.Features({**plain.features, **types})
    info.description = with_annotation(info.description, record)
    marks = [] if reasons is None else [sorted(reasons)]
    origin = json.dumps([plain._fingerprint, record, *marks], sort_keys=True).encode()
    annotated = datasets.Dataset(
        concat_tables([plain.data, added], axis=1),
        info=info,
        split=plain.split,
        indices_table=plain._indices,
        fingerprint=hashlib.sha256(origin).hexdigest()[:16],
    )
    form = plain.format
    if form["type"] is not None:
        names = form["columns"] if set(form["columns"]) != set(plain.column_names) else None
        annotated.set_format(form["type"], names, form["output_all_columns"], **form["format_kwargs"])
    return annotated
