"""The profiles of all parts merge into exactly the profile of the whole."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_dflop.errors import DatasetError
from hf_dflop.profile import DatasetProfile, profile_dataset
from hf_dflop.shapes import SHAPE_COLUMNS
from tests.unit.profile.test_bad_rows import mixed
from tests.unit.profile.test_dataset import make
from tests.unit.profile.undrawn import undrawn
from tests.unit.rows import tiny


@pytest.mark.parametrize("on_error", ["skip", "mark"])
def test_parts_of_a_dataset_with_bad_rows(on_error: str, tmp_path: Path) -> None:
    data = mixed()[0].add_column("source", ["a", "b", "c"] * 4)
    whole, expected = profile_dataset(data, tiny.llava(), on_error=on_error, verify=0)
    parts, folders = [], []
    for i in (2, 0, 1):
        rows, part = profile_dataset(data, tiny.llava(), on_error=on_error, verify=0, shard=(i, 3))
        parts.append((i, rows))
        with undrawn():
            part.save(tmp_path / str(i))
        folders.append(tmp_path / str(i))
    merged = DatasetProfile.merge(DatasetProfile.load(folder) for folder in folders)
    assert (merged.totals, merged.quantiles, merged.errors) == (expected.totals, expected.quantiles, expected.errors)
    assert merged.num_samples == expected.num_samples
    assert merged.provenance == expected.provenance
    assert merged.shapes is not None
    assert expected.shapes is not None
    for name, values in expected.shapes.to_columns().items():
        assert np.array_equal(merged.shapes.to_columns()[name], values)
    assert merged.subset is not None
    assert [merged.subset_names[i] for i in merged.subset] == whole["source"][:]
    joined = datasets.concatenate_datasets([rows for _, rows in sorted(parts, key=lambda pair: pair[0])])
    assert all(joined[name][:] == whole[name][:] for name in SHAPE_COLUMNS)


def test_what_cannot_be_merged() -> None:
    data = make(6)
    parts = [profile_dataset(data, tiny.llava(), verify=0, shard=(i, 3))[1] for i in range(3)]
    with pytest.raises(DatasetError, match=r"parts \(i, n\) \[\(0, 3\), \(1, 3\)\] are not each of 0 to 2 once"):
        DatasetProfile.merge(parts[:2])
    with pytest.raises(DatasetError, match="only profiles made with shard"):
        DatasetProfile.merge([profile_dataset(data, tiny.llava(), verify=0)[1]])
    other = profile_dataset(data, tiny.llava(), verify=0, labels="all", shard=(2, 3))[1]
    with pytest.raises(DatasetError, match=r"the parts differ in \['labels', 'processor'\]"):
        DatasetProfile.merge([*parts[:2], other])
    with pytest.raises(ValueError, match="shard is 3 of 3"):
        profile_dataset(data, tiny.llava(), shard=(3, 3))
    with pytest.raises(DatasetError, match="use fewer parts"):
        profile_dataset(data, tiny.llava(), shard=(0, 9))
    with pytest.raises(DatasetError, match="a stream has no known number of rows"):
        profile_dataset(data.to_iterable_dataset(), tiny.llava(), shard=(0, 2))
