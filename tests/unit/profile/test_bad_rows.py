"""Rows that are not usable are counted and listed; the others keep exactly their counts."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_dflop.errors import DatasetError
from hf_dflop.profile import DatasetProfile, profile_dataset
from hf_dflop.profile import counts as module
from hf_dflop.rows import encode, read_row
from hf_dflop.rows.layout import Layout
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes
from tests.unit.profile.undrawn import undrawn
from tests.unit.rows import tiny

COLUMNS = ("num_images", "image_tokens", "text_tokens", "label_tokens")


def picture(width: int = 40, height: int = 30, mode: str = "RGB", format: str = "JPEG", **options: Any) -> bytes:
    noise = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    drawn = Image.fromarray(noise)
    if mode == "I;16":
        drawn = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    drawn.convert(mode).save(file, format, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


GOOD = {"image": {"bytes": picture(), "path": None}, "question": "What is it?", "answer": "the sea"}
WHOLE = picture(120, 90)
BAD = {
    "the image cannot be decoded": {**GOOD, "image": {"bytes": WHOLE[: len(WHOLE) // 2], "path": None}},
    "no readable image header": {**GOOD, "image": {"bytes": b"", "path": None}},
    "No such file": {**GOOD, "image": {"bytes": None, "path": "/nowhere/at/all.jpg"}},
    "decompression bomb": {**GOOD, "image": {"bytes": bomb(), "path": None}},
    "column 'question' holds NoneType": {**GOOD, "question": None},
    "image placeholders but 1 images": {**GOOD, "question": "<image><image>?"},
    "UnicodeDecodeError": {**GOOD, "answer": b"\xff\xfe\xfa"},
    "column 'answer' holds NoneType": {**GOOD, "answer": None},
}
GOOD_AT = (2, 5, 9, 11)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    text = {
        name: pa.array([_bytes(r[name]) for r in rows], pa.binary()).view(pa.string())
        for name in ("question", "answer")
    }
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array([r["image"] for r in rows], kind), **text})


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def mixed() -> tuple[datasets.Dataset, dict[int, str]]:
    """Bad rows of every kind with good ones between, and what each should be told of."""
    rows, wanted, bad = [], {}, iter(BAD.items())
    for i in range(len(BAD) + len(GOOD_AT)):
        if i in GOOD_AT:
            rows.append({**GOOD, "answer": "the sea " * (i + 1)})
        else:
            wanted[i], row = next(bad)
            rows.append(row)
    info = datasets.DatasetInfo(
        features=datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
        )
    )
    return datasets.Dataset(table(rows), info=info), wanted


@pytest.mark.parametrize("num_proc", [None, 2])
def test_skip_drops_bad_rows_and_loses_nothing_else(num_proc: int | None) -> None:
    data, wanted = mixed()
    annotated, profile = profile_dataset(data, tiny.llava(), on_error="skip", num_proc=num_proc)
    assert [error.index for error in profile.errors] == sorted(wanted)
    for error in profile.errors:
        assert wanted[error.index] in error.reason
        assert error.reason.startswith(f"row {error.index}")
    good, _ = profile_dataset(data.select(GOOD_AT), tiny.llava())
    assert annotated.column_names == good.column_names
    assert [annotated[i] for i in range(4)] == [good[i] for i in range(4)]
    assert profile.num_samples == len(annotated) == 4
    assert profile.shapes is not None
    assert profile.shapes.to_columns()["dflop_text_tokens"].tolist() == annotated["dflop_text_tokens"][:]


def test_mark_keeps_bad_rows_with_counts_of_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, wanted = mixed()
    annotated, profile = profile_dataset(data, tiny.llava(), on_error="mark", verify=2)
    assert annotated.column_names == [*data.column_names, *SHAPE_COLUMNS, "dflop_error"]
    assert [i for i, reason in enumerate(annotated["dflop_error"]) if reason is not None] == sorted(wanted)
    shapes = Shapes.of_dataset(annotated)
    good = profile_dataset(data.select(GOOD_AT), tiny.llava())[1].shapes
    for name in COLUMNS:
        assert not getattr(shapes, name)[sorted(wanted)].any()
        assert getattr(shapes, name)[list(GOOD_AT)].tolist() == getattr(good, name).tolist()
    assert profile.quantiles["text_tokens"]["0.0"] > 0
    with undrawn():
        profile.save(tmp_path / "profile")
    assert DatasetProfile.load(tmp_path / "profile").errors == profile.errors
    assert f"{len(wanted)} rows are not usable" in profile.summary()
    # What was counted once serves every policy, from the cache and from the columns.
    monkeypatch.setattr(module, "Annotator", lambda *_, **__: pytest.fail("counted again"))
    for source in (data, annotated):
        skipped, again = profile_dataset(source, tiny.llava(), on_error="skip", verify=2)
        assert [e.index for e in again.errors] == sorted(wanted)
        assert "dflop_error" not in skipped.column_names
        assert len(skipped) == 4
        with pytest.raises(DatasetError, match=r"row 0.*cannot be decoded.*7 more rows are not usable"):
            profile_dataset(source, tiny.llava(), verify=2)


def test_a_selection_is_marked_where_its_rows_lie() -> None:
    data, wanted = mixed()
    order = [11, 3, 2, 0, 9]
    annotated, profile = profile_dataset(data.select(order), tiny.llava(), on_error="mark", verify=0)
    assert [e.index for e in profile.errors] == [1, 3]
    assert [reason is not None for reason in annotated["dflop_error"]] == [i in wanted for i in order]


def test_raise_is_the_default_and_names_the_first() -> None:
    data, _ = mixed()
    with pytest.raises(DatasetError, match=r"row 0, column 'image', image 0: the image cannot be decoded"):
        profile_dataset(data, tiny.llava(), verify=0)
    with pytest.raises(DatasetError, match="none of the 2 rows is usable"):
        profile_dataset(data.select([0, 1]), tiny.llava(), on_error="skip", verify=0)
    with pytest.raises(ValueError, match="unknown on_error 'drop'; choose one of 'raise', 'skip', 'mark'"):
        profile_dataset(data, tiny.llava(), on_error="drop")


def test_wrong_types_and_missing_turns() -> None:
    rows = [{"messages": turns} for turns in (None, [], [{"role": "user", "content": "hi"}] * 2, [{"role": "alien"}])]
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    data = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": [turn]}))
    _, profile = profile_dataset(data, tiny.llava(), on_error="skip", verify=0)
    assert [e.index for e in profile.errors] == [0, 1, 3]
    assert "has no text" in profile.errors[0].reason
    assert "unknown role 'alien'" in profile.errors[2].reason
    numbers = datasets.Dataset.from_dict({"question": [1, 2], "answer": ["a", "b"]})
    with pytest.raises(DatasetError, match="column 'question' holds int; expected text"):
        profile_dataset(numbers, tiny.llava(), verify=0)


def test_rows_with_a_video_or_a_sound_are_refused() -> None:
    """Their tokens would be missing from the counts; rows whose cells are empty are counted."""
    clip = {"bytes": b"not looked at", "path": None}
    rows = [{"question": "q", "answer": "a", "videos": videos} for videos in ([], [clip], None)]
    turn = {"question": datasets.Value("string"), "answer": datasets.Value("string")}
    cell = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    data = datasets.Dataset.from_list(rows, features=datasets.Features({**turn, "videos": [cell]}))
    with pytest.raises(DatasetError, match=r"row 1: holds a video, and LlavaProcessor takes none"):
        profile_dataset(data, tiny.llava(), verify=0)
    annotated, profile = profile_dataset(data, tiny.llava(), on_error="skip")
    assert len(annotated) == 2
    assert [error.index for error in profile.errors] == [1]
    sounds = datasets.Dataset.from_list([{"question": "q", "answer": "a", "speech": clip}] * 2)
    sounds = sounds.cast_column("speech", datasets.Audio())
    with pytest.raises(DatasetError, match=r"row 0, column 'speech', sound 0: the sound cannot be read"):
        profile_dataset(sounds, tiny.llava(), verify=0)
    part = [{"type": "audio", "text": None}]
    parts = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": part}]}])
    with pytest.raises(DatasetError, match="row 0: 1 audio placeholders but 0 audios"):
        profile_dataset(parts, tiny.llava(), verify=0)


def test_a_text_of_a_million_characters() -> None:
    data = datasets.Dataset.from_dict({"question": ["q"], "answer": ["the sea is " * 90_910]})
    _, profile = profile_dataset(data, tiny.llava(), verify=0, max_length=500)
    assert profile.totals["llm_tokens"] == 500


SPECIAL = {
    "cmyk": picture(90, 50, "CMYK"),
    "16-bit": picture(90, 50, "I;16", "PNG"),
    "grey": picture(90, 50, "L", "PNG"),
    "alpha": picture(90, 50, "RGBA", "PNG"),
    "palette": picture(90, 50, "P", "GIF"),
    "animated": picture(90, 50, "P", "GIF", save_all=True, append_images=[Image.new("P", (90, 50), 3)]),
    "webp": picture(90, 50, "RGB", "WEBP"),
    "tiff": picture(90, 50, "RGB", "TIFF"),
    "one pixel": picture(1, 1, "RGB", "PNG"),
    "trailing bytes": picture(90, 50) + b"\0\0appended",
}


@pytest.mark.parametrize("mark", [None, 3, 6])
def test_unusual_images_are_exact(mark: int | None) -> None:
    kinds = dict(SPECIAL)
    if mark is not None:
        exif = Image.Exif()
        exif[0x0112] = mark
        kinds = {form: picture(90, 50, "RGB", form, exif=exif) for form in ("JPEG", "PNG", "WEBP", "TIFF")}
    rows = [{**GOOD, "image": {"bytes": content, "path": None}} for content in kinds.values()]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    layout = Layout(kind="question", text_columns=("question", "answer"), image_column="image")
    for build in (tiny.qwen2_vl, tiny.llava_next):
        processor = build()
        annotated, _ = profile_dataset(data, processor, verify=len(data))
        for row in annotated:
            batch = encode(processor, [read_row(row, layout)])
            assert batch["input_ids"].shape[1] == row["dflop_image_tokens"] + row["dflop_text_tokens"]


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    data, wanted = mixed()
    pq.write_table(data.data.table, tmp_path / "rows.parquet")
    _, profile = profile_dataset(tmp_path / "rows.parquet", tiny.llava(), on_error="skip", verify=0)
    assert [error.index for error in profile.errors] == sorted(wanted)
