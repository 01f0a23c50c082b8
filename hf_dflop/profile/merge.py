"""The profiles of all parts of a dataset → the profile of the whole.

Inputs: profiles made with `shard=(i, n)`, with their samples. Output: what one call on the whole dataset would have
given: the same counts in the same order, the same totals, quantiles and errors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_dflop.errors import DatasetError
from hf_dflop.profile.subset import MOST_SUBSETS
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes

if TYPE_CHECKING:
    from hf_dflop.profile.report import DatasetProfile

__all__ = ["merge"]


def merge(profiles: "Sequence[DatasetProfile]") -> "DatasetProfile":
    """See `DatasetProfile.merge`."""
    from hf_dflop.profile.report import DatasetProfile

    parts = _in_order(profiles)
    columns: dict[str, list[Any]] = {name: [] for name in SHAPE_COLUMNS}
    for part in parts:
        if part.shapes is None:
            raise DatasetError("a part was saved without its samples; save it with samples=True")
        for name, values in part.shapes.to_columns().items():
            columns[name].append(values)
    errors = [error for part in parts for error in part.errors]
    provenance = {k: v for k, v in parts[0].provenance.items() if k not in ("shard", "num_rows")}
    names: dict[str, int] = {}
    codes = []
    for part in parts:
        if part.subset is not None:
            renamed = np.array([names.setdefault(name, len(names)) for name in part.subset_names], dtype=np.int64)
            codes.append(renamed[part.subset])
    complete = len(codes) == len(parts) and len(names) <= MOST_SUBSETS
    return DatasetProfile.from_shapes(
        Shapes.from_columns({name: np.concatenate(values) for name, values in columns.items()}),
        provenance=provenance,
        errors=errors,
        # Nothing was dropped under "mark", so a row's number is its place.
        unusable=[error.index for error in errors] if provenance.get("on_error") == "mark" else [],
        spec=parts[0].spec,
        subset_names=tuple(names) if complete else (),
        subset=np.concatenate(codes) if complete else None,
    )


def _in_order(profiles: "Sequence[DatasetProfile]") -> "list[DatasetProfile]":
    """The parts by their number, checked to be all of one run."""
    shards = [profile.provenance.get("shard") for profile in profiles]
    if not shards or any(shard is None for shard in shards):
        raise DatasetError("only profiles made with shard=(i, n) can be merged")
    found = sorted((int(shard[0]), int(shard[1])) for shard in shards if shard is not None)
    num_parts = found[0][1]
    if found != [(part, num_parts) for part in range(num_parts)]:
        raise DatasetError(f"parts (i, n) {found} are not each of 0 to {num_parts - 1} once; profile the missing ones")
    runs = [{k: v for k, v in profile.provenance.items() if k != "shard"} for profile in profiles]
    for run in runs[1:]:
        if different := sorted(key for key in {*run, *runs[0]} if run.get(key) != runs[0].get(key)):
            raise DatasetError(f"the parts differ in {different}; profile all of them alike")
    return sorted(profiles, key=lambda profile: profile.provenance["shard"][0])
