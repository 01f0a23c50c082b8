"""Which sub-dataset each row of a mixture comes from, where a column says so.

Input: the dataset and one of the usual column names. Output: names and, for each row, the number of its name.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_SUBSETS", "SUBSET_COLUMNS", "find_subsets"]

SUBSET_COLUMNS = ("source", "subset", "dataset", "dataset_name", "data_source", "origin", "task", "category")
MOST_SUBSETS = 1000
"""A column with more values than this names rows, not sub-datasets."""


def find_subsets(raw: Any) -> tuple[tuple[str, ...], npt.NDArray[np.int64] | None]:
    """Names and codes `(num_samples,)`; `((), None)` where no column names sub-datasets."""
    for column in SUBSET_COLUMNS:
        feature = raw.features.get(column)
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            continue
        names: dict[str, int] = {}
        codes = []
        try:
            for batch in raw.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
                encoded = batch.column(column).combine_chunks().dictionary_encode()
                known = [names.setdefault(name or "(none)", len(names)) for name in encoded.dictionary.to_pylist()]
                known.append(-1)
                codes.append(np.asarray(known)[encoded.indices.fill_null(len(known) - 1).to_numpy()])
                if len(names) > MOST_SUBSETS:
                    break
        except UnicodeDecodeError:
            continue
        found = np.concatenate(codes).astype(np.int64)
        if (found < 0).any():
            found[found < 0] = names.setdefault("(none)", len(names))
        if len(names) <= MOST_SUBSETS:
            return tuple(names), found
    return (), None
