"""Everything that a dataset can be: splits, files and folders, streams."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_dflop.errors import DatasetError, ProcessorError, StreamError
from hf_dflop.profile import annotation_of, profile_dataset
from hf_dflop.shapes import SHAPE_COLUMNS
from tests.unit.profile.test_bad_rows import GOOD_AT, mixed, picture
from tests.unit.profile.test_dataset import make
from tests.unit.rows import tiny


def counts_of(rows: Any) -> list[list[int]]:
    return [[row[name] for name in SHAPE_COLUMNS] for row in rows]


def test_a_dict_of_splits_comes_back_as_one() -> None:
    splits = datasets.DatasetDict(train=make(5), test=make(7))
    annotated, profiles = profile_dataset(splits, tiny.llava(), verify=1)
    assert isinstance(annotated, datasets.DatasetDict)
    assert {key: profile.num_samples for key, profile in profiles.items()} == {"train": 5, "test": 7}
    assert counts_of(annotated["test"])[:5] == counts_of(annotated["train"])
    picked, profile = profile_dataset(splits, tiny.llava(), split="test", verify=1)
    assert counts_of(picked) == counts_of(annotated["test"])
    assert profile.provenance["split"] == "test"
    splits["dev"] = mixed()[0]
    with pytest.raises(DatasetError, match="split 'dev': row 0"):
        profile_dataset(splits, tiny.llava(), verify=0)
    skipped, profiles = profile_dataset(splits, tiny.llava(), on_error="skip", verify=0)
    assert len(skipped["dev"]) == len(GOOD_AT)
    assert [len(profile.errors) for profile in profiles.values()] == [0, 0, 8]


def test_files_and_folders(tmp_path: Path) -> None:
    data = make(6)
    expected = counts_of(profile_dataset(data, tiny.llava(), verify=1)[0])
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    for path in (tmp_path / "parquet", tmp_path / "parquet" / "train.parquet"):
        for streaming in (False, True):
            annotated, profile = profile_dataset(path, tiny.llava(), verify=1, streaming=streaming)
            assert counts_of(annotated) == expected
            assert profile.provenance["dataset"] == str(path)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": "a", "answer": "b" * n}) for n in (1, 9)))
    annotated, _ = profile_dataset(tmp_path / "rows.jsonl", tiny.llava())
    assert annotated["dflop_label_tokens"][0] < annotated["dflop_label_tokens"][1]
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate(("a.jpg", "b.jpg")):
        (photos / name).write_bytes(picture(112 * (i + 1), 56))
    lines = [json.dumps({"file_name": name, "text": "the sea"}) for name in ("a.jpg", "b.jpg")]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    annotated, _ = profile_dataset(photos, tiny.qwen2_vl())
    assert annotated["dflop_image_patches"][:] == [32, 64]  # 8x4 and 16x4 patches of 14 pixels


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.xyz").write_text("")
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "rows.xyz", "'.xyz' are not read"), (tmp_path / "empty", "cannot be loaded")):
        with pytest.raises(DatasetError, match=said) as caught:
            profile_dataset(path, tiny.llava())
        assert "\n" not in str(caught.value)
    with pytest.raises(ProcessorError, match="cannot be loaded"):
        profile_dataset(make(2), tmp_path / "empty")


@pytest.mark.parametrize("known_features", [True, False])
def test_a_stream_is_counted_as_the_dataset_is(known_features: bool) -> None:
    data = make()
    expected, whole = profile_dataset(data, tiny.llava_next())
    stream = data.to_iterable_dataset(num_shards=2)
    if not known_features:
        stream = datasets.IterableDataset.from_generator(lambda: iter(data))
    annotated, profile = profile_dataset(stream, tiny.llava_next())
    assert profile.totals == whole.totals
    rows = list(annotated)
    assert counts_of(rows) == counts_of(expected)
    assert [row["id"] for row in rows] == data["id"][:]
    assert [image.size for image in rows[1]["images"]] == [image.size for image in data[1]["images"]]
    if known_features:
        assert annotated.column_names == expected.column_names
        assert annotation_of(annotated) == annotation_of(expected)
        again, _ = profile_dataset(annotated, tiny.qwen2_vl())
        assert again.column_names == expected.column_names


class Counted:
    """Rows that say how many were read."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.data = data
        self.num_read = 0

    def __call__(self) -> Any:
        for row in self.data:
            self.num_read += 1
            yield row


@pytest.mark.parametrize("sample", ["first", "random"])
def test_only_some_rows_of_a_stream_are_read(sample: str) -> None:
    data = datasets.Dataset.from_dict({"question": ["q " * i for i in range(1000)], "answer": ["a"] * 1000})
    rows = Counted(data)
    source = datasets.iterable_dataset.ExamplesIterable(lambda: enumerate(rows()), {})
    options = {"max_samples": 20, "sample": sample, "seed": 3, "verify": 2}
    annotated, profile = profile_dataset(datasets.IterableDataset(source), tiny.llava(), **options)
    assert rows.num_read <= (21 if sample == "first" else 220)
    assert profile.num_samples == 20
    assert profile.shapes is not None
    same = profile_dataset(datasets.IterableDataset(source), tiny.llava(), **options)[1]
    assert same.totals == profile.totals
    expected, first = profile_dataset(data, tiny.llava(), max_samples=20, verify=0)
    assert len(expected) == 20
    if sample == "first":
        assert first.totals == profile.totals
    else:
        assert profile.totals["text_tokens"] > first.totals["text_tokens"]
        assert profile_dataset(data, tiny.llava(), **options)[1].totals["text_tokens"] > first.totals["text_tokens"]
    assert counts_of(annotated.take(20)) == counts_of(expected)


@pytest.mark.parametrize("on_error", ["skip", "mark"])
def test_bad_rows_of_a_stream(on_error: str) -> None:
    data, wanted = mixed()
    stream = data.to_iterable_dataset().decode(False)
    utf8 = 8  # a stream cannot pass a row on that has no text form
    assert "Unicode" in wanted[utf8]
    stream = data.select([i for i in range(12) if i != utf8]).to_iterable_dataset()
    annotated, profile = profile_dataset(stream, tiny.llava(), on_error=on_error)
    assert len(profile.errors) == len(wanted) - 1
    rows = list(annotated.decode(False))
    if on_error == "skip":
        assert len(rows) == len(GOOD_AT) == profile.num_samples
    else:
        assert sum(row["dflop_error"] is not None for row in rows) == len(wanted) - 1
    with pytest.raises(DatasetError, match="row 0"):
        profile_dataset(stream, tiny.llava())


@pytest.mark.parametrize("num_good", [0, 70])
def test_a_stream_that_breaks(num_good: int) -> None:
    def rows() -> Any:
        for i in range(num_good):
            yield {"question": "q", "answer": "a " * (i + 1)}
        raise ConnectionError("gone")

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(StreamError, match=rf"row {num_good}: the stream broke after {num_good} rows.*gone"):
        profile_dataset(stream, tiny.llava())
    if not num_good:
        with pytest.raises(StreamError, match="after 0 rows"):
            profile_dataset(stream, tiny.llava(), on_error="skip")
        return
    _, profile = profile_dataset(stream, tiny.llava(), on_error="skip")
    assert profile.num_samples == num_good
    assert [error.index for error in profile.errors] == [num_good]
    assert "ConnectionError: gone" in profile.errors[0].reason


def test_a_folder_of_webdataset_archives(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"photos-{shard:05}.tar", "w") as archive:
            for i in range(2):
                for ending, content in (("jpg", picture(56 * (i + 1), 56 * (shard + 1))), ("txt", b"the sea")):
                    entry = tarfile.TarInfo(f"s{shard}{i}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, BytesIO(content))
    for path, streaming in ((tmp_path, False), (tmp_path, True), (tmp_path / "photos-00001.tar", False)):
        annotated, _ = profile_dataset(path, tiny.qwen2_vl(), streaming=streaming)
        patches = [row["dflop_image_patches"] for row in annotated]
        assert patches == ([32, 64] if path.suffix else [16, 32, 32, 64])  # 56 pixels are 4 patches of 14
