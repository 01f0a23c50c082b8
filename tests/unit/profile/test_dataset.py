"""`profile_dataset` from end to end, on small datasets with tiny processors."""

import dataclasses
import json
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dflop.errors import DatasetError, ShapeMismatchError
from hf_dflop.profile import DatasetProfile, annotation_of, processor_fingerprint, profile_dataset
from hf_dflop.profile import counts as module
from hf_dflop.rows import encode, read_row
from hf_dflop.rows.layout import Layout
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes
from tests.distributed.launch import PYTHONPATH
from tests.unit.rows import tiny


def cell(width: int, height: int, format: str = "JPEG", **options: Any) -> dict[str, Any]:
    file = BytesIO()
    noise = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def rotated(width: int, height: int, format: str) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return cell(width, height, format, exif=exif)


def make(num_rows: int = 24) -> datasets.Dataset:
    """Rows of 0, 1 and 2 images, some of them with an orientation mark."""
    rows = []
    for i in range(num_rows):
        images = [rotated(40 + 7 * i, 30, "PNG" if i % 2 else "JPEG")] if i % 3 else []
        images += [cell(30, 20 + 5 * i)] if i % 4 == 1 else []
        content = "<image>" * len(images) + "What is in the picture? " * (i % 5 + 1)
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "the sea " * (i + 1)}]
        rows.append({"id": f"r{i}", "messages": turns, "images": images})
    turns_feature = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = datasets.Features(
        {"id": datasets.Value("string"), "messages": turns_feature, "images": datasets.List(datasets.Image())}
    )
    return datasets.Dataset.from_list(rows, features=features)


def test_every_row_is_exact_and_the_dataset_stays_as_it_was() -> None:
    data, processor = make(), tiny.qwen2_vl()
    before = data.features.copy()
    annotated, profile = profile_dataset(data, processor)
    assert data.features == before
    assert not set(SHAPE_COLUMNS) & set(data.column_names)
    assert annotated.column_names == [*data.column_names, *SHAPE_COLUMNS]
    assert {k: annotated.features[k] for k in before} == dict(before)
    shapes = Shapes.from_columns(annotated[:])
    layout = Layout(kind="messages", text_columns=("messages",), image_column="images")
    for i, row in enumerate(annotated):
        batch = encode(processor, [read_row(row, layout)])
        assert batch["input_ids"].shape[1] == shapes.llm_tokens[i]
        assert int(batch["image_grid_thw"].prod(1).sum() if row["images"] else 0) == shapes.image_patches[i]
    assert profile.shapes is not None
    assert profile.shapes.to_columns().keys() == shapes.to_columns().keys()
    assert profile.totals["num_images"] == sum(len(row["images"]) for row in data)


def test_no_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    for name in ("PIL.Image.Image.load", "PIL.ImageFile.ImageFile.load", "PIL.PngImagePlugin.PngImageFile.load_end"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("pixels were decoded"))
    # The image of the self-check is the one picture that is really processed.
    monkeypatch.setattr("hf_dflop.profile.tokens.TokenCounter._check_probe", lambda *_: None)
    annotated, _ = profile_dataset(data, tiny.idefics3(), config=tiny.CONFIG, verify=0)
    assert len(annotated) == 24


def test_the_rows_of_a_selection_are_not_copied() -> None:
    data = make()
    shuffled = data.shuffle(seed=1).select(range(3, 17))
    annotated, profile = profile_dataset(shuffled, tiny.llava_next())
    whole, _ = profile_dataset(data, tiny.llava_next())
    tokens = dict(zip(whole["id"], whole["dflop_text_tokens"], strict=True))
    assert [tokens[i] for i in annotated["id"]] == list(annotated["dflop_text_tokens"])
    assert annotated._indices is not None
    assert len(annotated) == profile.num_samples == 14
    assert profile.totals["text_tokens"] == sum(annotated["dflop_text_tokens"])


def test_workers_count_the_same() -> None:
    one, _ = profile_dataset(make(), tiny.smolvlm(), config=tiny.CONFIG)
    datasets.disable_caching()
    try:
        two, _ = profile_dataset(make(), tiny.smolvlm(), config=tiny.CONFIG, num_proc=2)
    finally:
        datasets.enable_caching()
    assert all(one[column][:] == two[column][:] for column in SHAPE_COLUMNS)


def test_a_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    first, _ = profile_dataset(make(), tiny.llava(), verify=4)
    monkeypatch.setattr(module, "Annotator", lambda *_, **__: pytest.fail("counted again"))
    second, _ = profile_dataset(make(), tiny.llava(), verify=4)
    assert second["dflop_text_tokens"][:] == first["dflop_text_tokens"][:]
    assert second._fingerprint == first._fingerprint
    # A better verified result, another policy, or another processor is another matter.
    for options in ({"verify": 5}, {"labels": "all"}, {"max_length": 900}):
        with pytest.raises(pytest.fail.Exception, match="counted again"):
            profile_dataset(make(), tiny.llava(), **{"verify": 4, **options})


SECOND_PROCESS = """
import sys, time
import datasets
from hf_dflop.profile import counts as module, profile_dataset
from tests.unit.rows import tiny
data, processor = datasets.load_from_disk(sys.argv[1]), tiny.llava()
module.Annotator = None
start = time.perf_counter()
annotated, profile = profile_dataset(data, processor)
print(time.perf_counter() - start, profile.totals["text_tokens"])
"""


def test_a_fresh_process_reads_the_cache(tmp_path: Path, own_cache: Path) -> None:
    make().save_to_disk(tmp_path / "data")
    _, profile = profile_dataset(datasets.load_from_disk(tmp_path / "data"), tiny.llava())
    run = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "data")],
        env={"PYTHONPATH": PYTHONPATH, "HF_DATASETS_CACHE": str(own_cache), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, text_tokens = run.stdout.split()
    assert int(text_tokens) == profile.totals["text_tokens"]
    assert float(seconds) < 2.0


def test_a_stopped_call_goes_on_behind_the_last_whole_chunk(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    data = make()
    expected, _ = profile_dataset(data, tiny.llava(), labels="all")
    monkeypatch.setattr(module, "CHUNK_ROWS", 5)
    seen: list[int] = []
    stops_at = [12]
    original = module.Annotator.__call__

    def counted(self: Any, table: Any, indices: Any) -> Any:
        if max(indices) >= stops_at[0]:
            raise KeyboardInterrupt
        seen.extend(indices)
        return original(self, table, indices)

    monkeypatch.setattr(module.Annotator, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        profile_dataset(data, tiny.llava())
    assert seen == list(range(10))
    seen.clear()
    stops_at[0] = 999
    annotated, _ = profile_dataset(data, tiny.llava())
    assert seen == list(range(10, 24))
    assert not list(own_cache.rglob("*.parts"))
    assert annotated["dflop_text_tokens"][:] == expected["dflop_text_tokens"][:]


def test_annotated_rows_are_used_again_and_other_processors_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotated, profile = profile_dataset(make(), tiny.llava())
    assert annotation_of(make()) is None
    annotated.select(range(5)).shuffle(seed=0).save_to_disk(tmp_path / "saved")
    for kept in (annotated, annotated.filter(lambda row: True), datasets.load_from_disk(tmp_path / "saved")):
        record = annotation_of(kept)
        assert record is not None
        assert record["processor"] == processor_fingerprint(tiny.llava()) == profile.provenance["processor"]
        assert record["processor"] != processor_fingerprint(tiny.qwen2_vl())
        assert record["processor"] != processor_fingerprint(tiny.llava(), labels="all")
    assert annotation_of(annotated.remove_columns("dflop_text_tokens")) is None
    with monkeypatch.context() as patch:
        patch.setattr(module, "Annotator", lambda *_, **__: pytest.fail("counted again"))
        assert profile_dataset(annotated.select(range(5)), tiny.llava())[1].num_samples == 5
    other, _ = profile_dataset(annotated, tiny.qwen2_vl())
    assert other.column_names == annotated.column_names
    assert annotation_of(other)["processor"] == processor_fingerprint(tiny.qwen2_vl())
    assert other.info.description.count("hf_dflop annotation") == 1
    assert other["dflop_image_tokens"][:] != annotated["dflop_image_tokens"][:]
    with pytest.raises(DatasetError, match="joins rows of 2 different annotations"):
        annotation_of(datasets.concatenate_datasets([annotated, other]))


def test_the_fingerprint_is_of_what_changes_counts() -> None:
    base = processor_fingerprint(tiny.llava())
    same = tiny.llava()
    same.tokenizer.padding_side = "left"
    same(text=["x", "yy"], padding=True, truncation=True, max_length=9)
    assert processor_fingerprint(same) == base
    changed = []
    for name, value in (("patch_size", 7), ("chat_template", "{{ messages }}")):
        processor = tiny.llava()
        setattr(processor, name, value)
        changed.append(processor_fingerprint(processor))
    processor = tiny.llava()
    processor.image_processor.crop_size = {"height": 28, "width": 28}
    changed.append(processor_fingerprint(processor))
    processor = tiny.llava()
    processor.tokenizer.add_tokens(["sea"])
    changed += [processor_fingerprint(processor), processor_fingerprint(tiny.llava(), max_length=9), base]
    assert len(set(changed)) == len(changed)


def test_a_mismatch_names_the_row_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    processor = tiny.llava_next()
    right = type(processor)._get_unpadded_features

    def wrong(self: Any, height: int, width: int, *rest: Any) -> tuple[int, int]:
        unpadded, newline = right(self, height, width, *rest)
        return unpadded + (height == 41), newline  # a rule that only a certain size breaks

    data = make(6).add_column("n", list(range(6)))
    bad = {**data[1], "images": [cell(50, 41)], "messages": data[1]["messages"]}
    bad["messages"][0]["content"] = "<image>why"
    data = datasets.Dataset.from_list([*data.select([0]).to_list(), bad], features=data.features)
    from hf_dflop.profile.tokens import TokenCounter

    original = TokenCounter._count

    def count(self: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(type(processor), "_get_unpadded_features", wrong)
            return original(self, *args)

    monkeypatch.setattr(TokenCounter, "_count", count)
    with pytest.raises(
        ShapeMismatchError, match=r"row 1: column dflop_image_tokens was computed as (\d+), but .* \d+"
    ):
        profile_dataset(data, processor)
    assert not list((own_cache / "hf_dflop").glob("*"))


def test_columns_of_mapped_rows_are_mapped(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "rows.parquet"
    make().to_parquet(path)
    expected, _ = profile_dataset(make(), tiny.llava())
    assert not expected.cache_files  # rows in memory, and what map() makes of them is kept nowhere
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    picked = [3, 20, 3, 7]
    for data, order in (
        (rows, range(len(rows))),
        (rows.select(range(4, 9)), range(4, 9)),
        (rows.select(picked), picked),
    ):
        for _ in range(2):  # counted, and read
            annotated, profile = profile_dataset(data, tiny.llava())
            assert len(annotated.cache_files) == 2
            for name, values in profile.shapes.to_columns().items():
                assert not values.flags.owndata
                assert not values.flags.writeable
                assert values.tolist() == annotated[name][:] == expected.select(order)[name][:]
            for path in own_cache.rglob("*.placed.arrow"):
                path.unlink()
                path.write_bytes(b"of counts that another version of transformers had")


def test_without_caching_nothing_stays(own_cache: Path) -> None:
    datasets.disable_caching()
    try:
        annotated, profile = profile_dataset(make(), tiny.llava())
    finally:
        datasets.enable_caching()
    assert sum(annotated["dflop_text_tokens"][:]) == profile.totals["text_tokens"]
    assert not (own_cache / "hf_dflop").exists()


def test_quantiles_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dflop.profile import distinct

    monkeypatch.setattr(distinct, "_ROWS", 7)
    rng = np.random.default_rng(0)
    counts = {field.name: rng.integers(0, 9, 40) for field in dataclasses.fields(Shapes)}
    counts["image_patches_sq"] = rng.integers(0, 2**50, 40)
    shapes = Shapes(**counts)
    left_out = [0, 6, 7, 22, 39]
    profile = DatasetProfile.from_shapes(shapes, unusable=left_out)
    for name, found in profile.quantiles.items():
        kept = np.delete(getattr(shapes, name), left_out)
        np.testing.assert_allclose(list(found.values()), np.quantile(kept, [float(q) for q in found]), rtol=1e-15)
        assert profile.totals[name] == kept.sum()


def test_formats_and_transforms_are_kept() -> None:
    data = make().with_format("numpy", columns=["id"])
    annotated, _ = profile_dataset(data, tiny.llava(), verify=0)
    assert annotated.format["type"] == "numpy"
    assert annotated.format["columns"] == ["id"]
    annotated, _ = profile_dataset(make().with_format("numpy"), tiny.llava(), verify=0)
    assert isinstance(annotated[:2]["dflop_text_tokens"], np.ndarray)
    annotated, _ = profile_dataset(make().with_transform(lambda b: {"x": b["id"]}), tiny.llava(), verify=0)
    assert annotated[0] == {"x": "r0"}


def test_a_layout_function_and_a_single_image_column() -> None:
    data = datasets.Dataset.from_list([{"pic": cell(60, 40), "q": "why?", "a": "so"}] * 3).cast_column(
        "pic", datasets.Image()
    )

    def read(row: dict[str, Any]) -> dict[str, Any]:
        turns = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
        return {"messages": turns, "images": [row["pic"]]}

    _, by_function = profile_dataset(data, tiny.paligemma(), config=tiny.CONFIG, layout=read)
    renamed = data.rename_columns({"q": "question", "a": "answer"})
    _, by_structure = profile_dataset(renamed, tiny.paligemma(), config=tiny.CONFIG)
    assert by_function.totals == by_structure.totals


def test_images_that_are_files_or_missing(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(rotated(112, 56, "JPEG")["bytes"])
    paths = [str(tmp_path / "0.jpg"), None, str(tmp_path / "2.jpg")]
    data = datasets.Dataset.from_dict({"image": paths, "question": ["why"] * 3, "answer": ["so"] * 3})
    by_type, _ = profile_dataset(data.cast_column("image", datasets.Image()), tiny.qwen2_vl())
    by_name, _ = profile_dataset(data, tiny.qwen2_vl())
    # 112x56 pixels are 8x4 patches of 14.
    assert by_type["dflop_image_patches"][:] == by_name["dflop_image_patches"][:] == [32, 0, 32]


def test_paths_and_ids(tmp_path: Path) -> None:
    processor = tiny.llava()
    processor.save_pretrained(tmp_path / "processor")
    make().save_to_disk(tmp_path / "data")
    annotated, profile = profile_dataset(str(tmp_path / "data"), tmp_path / "processor", verify=2)
    assert profile.provenance["dataset"] == str(tmp_path / "data")
    assert len(annotated) == 24
    datasets.DatasetDict(train=make(4), test=make(5)).save_to_disk(tmp_path / "splits")
    _, profile = profile_dataset(tmp_path / "splits", processor, split="test")
    assert profile.num_samples == 5
    with pytest.raises(DatasetError, match=r"split 'dev' is not one of \['train', 'test'\]"):
        profile_dataset(tmp_path / "splits", processor, split="dev")
    lines = [json.dumps({"question": "a", "answer": "b"})] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert profile_dataset(loaded, processor)[1].totals["image_tokens"] == 0


def test_errors_name_the_row_and_the_column() -> None:
    data = make(6)
    rows = data.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
    rows[4]["images"] = [{"bytes": b"broken", "path": None}]
    rows[4]["messages"][0]["content"] = "<image>"
    broken = datasets.Dataset.from_list(rows, features=data.features)
    with pytest.raises(DatasetError, match=r"row 4, column 'images', image 0: the image cannot be read"):
        profile_dataset(broken, tiny.llava(), verify=0)
    with pytest.raises(DatasetError, match=r"row 4, column 'images', image 0: the image cannot be read"):
        profile_dataset(broken, tiny.llava(), verify=0, num_proc=2)
    with pytest.raises(DatasetError, match=r"no image column 'imgaes'.*Columns: \['id'.*image_column='images'"):
        profile_dataset(data, tiny.llava(), image_column="imgaes")
    with pytest.raises(DatasetError, match=r"row 1: 2 image placeholders but 0 images; no image column was found"):
        profile_dataset(data.remove_columns("images"), tiny.llava(), verify=0)
    with pytest.raises(DatasetError, match=r"row \d: \d+ tokens, more than max_length=12; the cut would keep"):
        profile_dataset(data, tiny.llava(), max_length=12, verify=0)
    with pytest.raises(DatasetError, match="list cannot be annotated"):
        profile_dataset(data.to_list(), tiny.llava())
    with pytest.raises(DatasetError, match="no rows"):
        profile_dataset(data.select([]), tiny.llava())


def test_counting_is_fifty_times_faster_than_processing() -> None:
    """Photos of as many sizes as rows, both ways in turn, a third of the rows processed each time; the same counts."""
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "the sea " * 40}]
    photos = [cell(2048 - 8 * i, 1536 + 4 * i, quality=90) for i in range(24)]
    data = datasets.Dataset.from_list([{"messages": turns, "images": [photo]} for photo in photos])
    data = data.cast_column("images", datasets.List(datasets.Image()))
    processor = tiny.llava_next()
    layout = Layout(kind="messages", text_columns=("messages",), image_column="images")
    profile_dataset(data.select([0]), processor, verify=1)
    ratios = []
    datasets.disable_caching()
    try:
        for turn in range(3):
            start = time.perf_counter()
            annotated, _ = profile_dataset(data, processor, verify=0)
            counting_s = (time.perf_counter() - start) / 24  # of a row, as the other one
            start = time.perf_counter()
            batches = [encode(processor, [read_row(data[i], layout)]) for i in range(turn, 24, 3)]
            ratios.append((time.perf_counter() - start) / 8 / counting_s)
            lengths = [batch["input_ids"].shape[1] for batch in batches]
            assert Shapes.of_dataset(annotated).llm_tokens[turn::3].tolist() == lengths
    finally:
        datasets.enable_caching()
    assert sorted(ratios)[1] >= 50, ratios


def test_profiles_save_and_load(tmp_path: Path) -> None:
    _, profile = profile_dataset(make(), tiny.llava(), verify=0)
    profile.save(tmp_path / "profile")
    assert {p.name for p in (tmp_path / "profile").iterdir()} >= {"profile.json", "shapes.npz", "profile.png"}
    loaded = DatasetProfile.load(tmp_path / "profile")
    assert loaded.shapes is not None
    assert profile.shapes is not None
    assert (loaded.totals, loaded.quantiles, loaded.provenance) == (
        profile.totals,
        profile.quantiles,
        profile.provenance,
    )
    for name, values in profile.shapes.to_columns().items():
        assert np.array_equal(loaded.shapes.to_columns()[name], values)
    profile.save(tmp_path / "profile", samples=False)
    assert DatasetProfile.load(tmp_path / "profile").shapes is None
    assert "24 samples" in profile.summary()
    assert "image_patches" in profile.summary()
    with pytest.raises(DatasetError, match="is not there"):
        DatasetProfile.load(tmp_path)
    (tmp_path / "profile.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DatasetError, match="another format"):
        DatasetProfile.load(tmp_path)
