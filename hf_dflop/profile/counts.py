"""The counts of all rows of a map-style dataset: from the cache, or counted chunk by chunk.

Counts lie in the cache folder of `datasets` under a key of the dataset's fingerprint, the processor's fingerprint
and the policy, so that a second call, in any process and with any number of workers, reads them. Each chunk is
written when it is counted: a call that was stopped goes on behind the last whole chunk. Bad rows are cached with
their reasons, whatever `on_error` says. A few random rows are really processed first, and a mismatch stops here.

Memory does not grow with the rows: they are read in batches, and their counts lie in a file that is mapped.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_dflop.errors import DatasetError, ShapeMismatchError
from hf_dflop.profile.annotate import ERROR_COLUMN, Annotator
from hf_dflop.profile.bad_rows import reasons_of
from hf_dflop.profile.counts_file import counts_folder, read_counts, staged_counts, write_counts
from hf_dflop.profile.policy import Policy
from hf_dflop.profile.tokens import TokenCounter
from hf_dflop.profile.verify import check_row
from hf_dflop.rows import Layout, detect_layout, read_row
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes

if TYPE_CHECKING:
    from datasets.table import MemoryMappedTable

__all__ = ["cached_counts", "find_layout", "verify_row"]

logger = logging.getLogger(__name__)

CHUNK_ROWS = 65_536
"""Rows that are counted before their counts are written."""
_BATCH_ROWS = 512
_SCATTERED_ROWS = 64
"""Rows of a batch under a select or shuffle, where datasets copies them, pictures and all."""
_LOOKED_AT = 64
"""Rows in which the layout is looked for, when the first ones are not readable."""


def find_layout(raw: Any, policy: Policy) -> Layout:
    """The layout, from the first row that can be read."""
    first: Exception | None = None
    for index in range(min(len(raw), _LOOKED_AT)):
        try:
            return detect_layout(raw[index], raw.features, layout=policy.layout, image_column=policy.image_column)
        except Exception as error:
            first = first or error
            if policy.on_error == "raise":
                break
    assert first is not None
    if isinstance(first, DatasetError):
        raise first
    raise DatasetError(f"row 0: cannot be read: {type(first).__name__}: {first}") from first


def cached_counts(
    raw: Any, policy: Policy, layout: Layout, record: dict[str, Any]
) -> "tuple[MemoryMappedTable, Shapes, dict[int, str]]":
    """The counts of all rows, as a mapped table and as shapes that lie in it, and the reasons of the bad ones."""
    import datasets
    import transformers

    parts = [raw._fingerprint, len(raw), transformers.__version__, record]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = counts_folder() / f"{key}.arrow"
    verified = min(policy.verify, len(raw))
    if datasets.is_caching_enabled() and path.exists():
        table, kept = read_counts(path)
        if kept["verified"] >= verified:
            logger.info("shape columns read from %s", path)
            return table, Shapes.from_table(table), dict(kept["reasons"])
    counter = TokenCounter(policy.processor, policy.config)
    annotator = Annotator(counter, layout, policy.labels, policy.max_length, raises=policy.on_error == "raise")
    damaged = verify_rows(raw, annotator, policy)
    with staged_counts(len(raw)) as columns:
        reasons = damaged | _in_chunks(raw, annotator, policy, key, columns)
        for values in columns.values():
            values[list(damaged)] = 0
        write_counts(path, columns, {"verified": verified, "reasons": list(reasons.items())})
    shutil.rmtree(_parts(key), ignore_errors=True)
    table, _ = read_counts(path)
    return table, Shapes.from_table(table), reasons


def _parts(key: str) -> Path:
    """Where chunks lie until all are counted."""
    return counts_folder() / f"{key}.parts"


def _in_chunks(
    raw: Any, annotator: Annotator, policy: Policy, key: str, columns: Mapping[str, np.ndarray]
) -> dict[int, str]:
    """Fill the columns of all rows, and give the reasons of bad ones; chunks that were written are read."""
    folder = _parts(key)
    reasons: dict[int, str] = {}
    missing = []
    for start in range(0, len(raw), CHUNK_ROWS):
        if not (folder / f"{start}.arrow").exists():
            missing.append(start)
            continue
        chunk, kept = read_counts(folder / f"{start}.arrow")
        for name, values in columns.items():
            values[start : start + CHUNK_ROWS] = chunk.column(name).to_numpy()
        reasons |= dict(kept["reasons"])
    if reasons and annotator.raises:
        raise DatasetError(reasons[min(reasons)])
    num_chunks = max(1, policy.num_proc or 1)  # so that starting workers is worth it
    for first in range(0, len(missing), num_chunks):
        starts = missing[first : first + num_chunks]
        rows = [row for start in starts for row in (start, min(start + CHUNK_ROWS, len(raw)))]
        indices = np.concatenate([np.arange(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)])
        whole = len(indices) == len(raw)
        contiguous = indices[-1] - indices[0] + 1 == len(indices)
        part = raw if whole else raw.select(range(indices[0], indices[-1] + 1) if contiguous else indices)
        counted, bad = _count(part, indices, annotator, policy, key)
        offset = 0
        for start, end in zip(rows[::2], rows[1::2], strict=True):
            here = {index: reason for index, reason in bad.items() if start <= index < end}
            chunk = {name: values[offset : offset + end - start] for name, values in counted.items()}
            offset += end - start
            for name, values in chunk.items():
                columns[name][start:end] = values
            reasons |= here
            if len(raw) > CHUNK_ROWS:
                write_counts(folder / f"{start}.arrow", chunk, {"reasons": list(here.items())})
    return reasons


def _count(
    part: Any, indices: np.ndarray, annotator: Annotator, policy: Policy, key: str
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Columns of some rows, and the reasons of the bad ones by their place in the whole dataset."""
    import datasets

    layout = annotator.layout
    narrow = part if layout.columns is None else part.select_columns(list(layout.columns))
    scattered = narrow._indices is not None and layout.image_column is not None
    features = {column: datasets.Value("int64") for column in SHAPE_COLUMNS}
    counted = narrow.with_format("arrow").map(
        _Numbered(annotator, indices),
        batched=True,
        batch_size=_SCATTERED_ROWS if scattered else _BATCH_ROWS,
        with_indices=True,
        remove_columns=narrow.column_names,
        features=datasets.Features({**features, ERROR_COLUMN: datasets.Value("string")}),
        num_proc=policy.num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=f"{key}{indices[0]}",
        desc="Counting tokens",
    )
    table = counted.with_format("arrow")[:]
    bad = reasons_of(table.column(ERROR_COLUMN).to_pylist())
    return {name: table.column(name).to_numpy() for name in features}, {int(indices[i]): r for i, r in bad.items()}


class _Numbered:
    """The annotator, told where in the whole dataset its rows lie."""

    def __init__(self, annotator: Annotator, indices: np.ndarray) -> None:
        self.annotator = annotator
        self.indices = indices

    def __call__(self, table: Any, positions: list[int]) -> dict[str, list[Any]]:
        return self.annotator(table, self.indices[positions].tolist())


def verify_rows(raw: Any, annotator: Annotator, policy: Policy) -> dict[int, str]:
    """Really process a few rows; the reasons of those that turn out to be damaged (unless they raise)."""
    picked = np.random.default_rng(policy.seed).permutation(len(raw))[: policy.verify]
    damaged = {}
    for index in sorted(int(i) for i in picked):
        try:
            verify_row(raw[index], index, annotator)
        except ShapeMismatchError:
            raise
        except Exception as error:
            if annotator.raises:
                raise
            damaged[index] = str(error) if isinstance(error, DatasetError) else f"row {index}: {error}"
    return damaged


def verify_row(row: Mapping[str, Any], index: int, annotator: Annotator) -> None:
    read = read_row(row, annotator.layout, index=index)
    counter = annotator.counter
    counted = annotator.count([read])[0]
    check_row(counter.processor, read, counted, counter, annotator.renderer, annotator.max_length)
