"""Counts from sizes equal the counts of really processed rows, for every structure of processor that builds here."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.profile import TokenCounter
from hf_dflop.profile.annotate import Annotator
from hf_dflop.profile.verify import measure
from hf_dflop.rows import Layout, Row, encode
from tests.unit.rows import tiny

SIZES = [
    *((1, 1), (3, 40), (8, 8), (28, 45), (56, 56), (57, 56), (100, 20)),
    *((20, 300), (200, 200), (333, 90), (480, 640), (64, 900), (2, 200), (180, 181)),
]
IMAGE = {"type": "image"}


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def single(height: int, width: int) -> Row:
    messages = [turn("user", IMAGE, "What is in the image?\n"), turn("assistant", "a cat.\n\n")]
    return Row(messages=messages, images=[picture(height, width)])


TEXT_ONLY = Row(messages=[turn("user", "hi\n"), turn("assistant", "the sea")], images=[])
MULTI = Row(
    messages=[
        turn("user", IMAGE, IMAGE, "the picture"),
        turn("assistant", "x y"),
        turn("user", "and?\n", IMAGE),
        turn("assistant", "more\n\n"),
    ],
    images=[picture(100, 40), picture(40, 300), picture(56, 56)],
)
INTERLEAVED = Row(
    messages=[turn("user", "x"), turn("assistant", "the sea\n", IMAGE, "\n\na photo", IMAGE)],
    images=[picture(100, 40), picture(40, 300)],
)
DOCUMENT = Row(
    messages=[turn("assistant", "the sea\n", IMAGE, "\n\na photo", IMAGE, " end ")],
    images=[picture(100, 40), picture(40, 300)],
)


def annotator(build: Any, labels: str = "assistant", max_length: int | None = None) -> Annotator:
    counter = TokenCounter(build(), tiny.config_of(build))
    return Annotator(counter, Layout(kind="messages"), labels, max_length)


def counted_and_real(counts: Annotator, row: Row) -> tuple[dict[str, int], dict[str, int]]:
    counted = counts.count([row])[0]
    batch = encode(counts.counter.processor, [row], labels=counts.renderer.labels, max_length=counts.max_length)
    return counted, measure(batch, counts.counter) | {"num_images": len(row.images), "num_audios": 0, "audio_ms": 0}


@pytest.mark.parametrize("labels", ["assistant", "all"])
@pytest.mark.parametrize("build", tiny.PROCESSORS, ids=lambda b: b.__name__)
def test_counts_equal_the_processor(build: Any, labels: str) -> None:
    counts = annotator(build, labels)
    rows = [single(*size) for size in SIZES] + [MULTI]
    if build is not tiny.paligemma:
        rows += [TEXT_ONLY, INTERLEAVED, DOCUMENT]
    for row in rows:
        counted, real = counted_and_real(counts, row)
        assert counted == real, [image.size for image in row.images]


@pytest.mark.parametrize("labels", ["assistant", "all"])
@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_vl, tiny.idefics3, tiny.gemma3], ids=lambda b: b.__name__)
def test_truncated_rows_are_counted_as_cut(build: Any, labels: str) -> None:
    words = " the picture" * 40
    row = Row(messages=[turn("user", IMAGE, "why?"), turn("assistant", words)], images=[picture(56, 56)])
    whole = sum(annotator(build, labels).count([row])[0][name] for name in ("image_tokens", "text_tokens"))
    counts = annotator(build, labels, max_length=whole - 17)
    counted, real = counted_and_real(counts, row)
    assert counted == real
    assert counted["image_tokens"] + counted["text_tokens"] == whole - 17


def test_a_cut_through_an_image_is_refused() -> None:
    row = Row(messages=[turn("user", "why?" * 5, IMAGE), turn("assistant", "so")], images=[picture(56, 56)], index=7)
    counts = annotator(tiny.llava, max_length=20)
    with pytest.raises(DatasetError, match=r"row 7: .* of 16 image tokens"):
        counts.count([row])
    with pytest.raises(DatasetError, match=r"row 7: .*max_length would cut an image"):
        encode(counts.counter.processor, [row], max_length=20)


def test_numbers_by_hand() -> None:
    # LLaVA, 56 px crop, patch 14, CLS token dropped: 1 tile of 4x4 patches, 16 tokens.
    image = TokenCounter(tiny.llava()).count([(300, 700)])[0]
    assert (image.tiles, image.patches, image.patches_sq, image.image_tokens) == (1, 16, 256, 16)
    # Qwen2-VL, patch 14, merge 2: 280x560 is 20x40 patches, and 800 / 4 = 200 tokens.
    image = TokenCounter(tiny.qwen2_vl()).count([(280, 560)])[0]
    assert (image.tiles, image.patches, image.patches_sq, image.image_tokens) == (1, 800, 640_000, 200)
    # OneVision: a 54 px base tile and 2x3 tiles of 9 patches; two images in a sample get one tile each.
    counter = TokenCounter(tiny.llava_onevision())
    assert counter.count([(108, 162)])[0].tiles == 7
    assert counter.count([(108, 162)])[0].patches == 63
    assert [image.tiles for image in counter.count([(108, 162), (54, 54)])] == [1, 1]
    # Pixtral, patch 16: 100x40 rounds up to 7x3 patches; 21 image tokens and a break or end per row.
    image = TokenCounter(tiny.pixtral()).count([(100, 40)])[0]
    assert (image.patches, image.image_tokens, image.replacement.count("[IMG_BREAK]")) == (21, 21, 6)


def test_equal_sizes_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = TokenCounter(tiny.qwen2_vl())
    first = counter.count([(200, 300)])[0]
    monkeypatch.setattr(counter, "_count", lambda *_: pytest.fail("counted again"))
    assert counter.count([(200, 300)])[0] is first


def test_not_all_sizes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dflop.profile.tokens._MOST_REMEMBERED", 8)
    counter = TokenCounter(tiny.qwen2_vl())
    counts = [counter.count([(60 + i, 90)])[0] for i in range(30)]
    assert len(counter._cache) <= 8
    assert counts[0] == counter.count([(60, 90)])[0]
    assert len(counts[0].replacement) == counts[0].image_tokens * len("<|image_pad|>")


def test_the_patch_size_must_be_known() -> None:
    with pytest.raises(ProcessorError, match=r"pass config=AutoConfig"):
        TokenCounter(tiny.internvl())
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=16))
    with pytest.raises(ProcessorError, match="patch size 14, the model's vision config 16"):
        TokenCounter(tiny.llava(), config)


def test_a_processor_that_cannot_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProcessorError, match="not its tokenizer"):
        TokenCounter(tiny.tokenizer())
    # Inserts another number of tokens each time it runs: neither sizes nor a blank image tell what training will see.
    lengths = iter(range(3, 99, 2))
    wrong = tiny.llava()
    with monkeypatch.context() as patch:
        patch.setattr(type(wrong), "replace_image_token", lambda *_, **__: "<image>" * next(lengths))
        with pytest.raises(ProcessorError, match="'processed', but an image of 750x300 gives 9 tokens where 7 were"):
            TokenCounter(wrong)


def test_where_sizes_do_not_tell_a_blank_image_is_processed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rule that is not known: more tokens for images whose pixels are there, which shapes alone do not show."""
    processor = tiny.llava()
    right = type(processor).replace_image_token

    def hidden(self: Any, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        pixels = np.asarray(image_inputs["pixel_values"][image_idx])
        return right(self, image_inputs, image_idx, **kwargs) + "<image>" * int(pixels.strides[-1] > 0)

    monkeypatch.setattr(type(processor), "replace_image_token", hidden)
    counts = Annotator(TokenCounter(processor), Layout(kind="messages"))
    assert counts.counter.structure == "processed"
    assert "which takes longer, since it has structure 'fixed', but an image of 750x300 gives 17 tokens" in caplog.text
    assert counts.counter.count([(40, 30)])[0].image_tokens == 17
    for row in (single(40, 30), MULTI, TEXT_ONLY):
        counted, real = counted_and_real(counts, row)
        assert counted == real
    with monkeypatch.context() as patch:  # what was processed is remembered
        patch.setattr("hf_dflop.profile.tokens.process_blank", lambda *_: pytest.fail("processed again"))
        assert counts.counter.count([(40, 30)])[0].image_tokens == 17


def test_an_image_that_the_processor_refuses_is_named() -> None:
    row = single(2, 900)
    counts = annotator(tiny.qwen2_vl)
    with pytest.raises(DatasetError, match=r"refuses an image among \[\(900, 2\)\].*aspect ratio"):
        counts.count([row])


def test_text_that_holds_the_image_token_is_refused() -> None:
    row = Row(messages=[turn("user", "say <image_soft_token>"), turn("assistant", "no")], images=[], index=2)
    with pytest.raises(DatasetError, match="row 2: the text itself contains the image token"):
        annotator(tiny.gemma3).count([row])
    row = Row(messages=[turn("user", "say <image>"), turn("assistant", "no")], images=[], index=2)
    with pytest.raises(DatasetError, match="row 2: the rendered text has 1 placeholders '<image>' for 0 images"):
        annotator(tiny.llava).count([row])


def test_paligemma_needs_an_image() -> None:
    with pytest.raises(DatasetError, match="needs one in every row"):
        annotator(tiny.paligemma).count([TEXT_ONLY])


def test_image_bytes_are_read_in_place() -> None:
    import pyarrow as pa

    from hf_dflop.profile.annotate import _image_lists

    cell_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows: list[list[dict[str, object] | None] | None] = [
        [{"bytes": b"aaa", "path": None}, None],
        None,
        [],
        [{"bytes": None, "path": "x"}, {"bytes": b"zz", "path": "y"}],
        [{"bytes": b"", "path": None}],
    ]
    for kind in (pa.list_(cell_type), pa.large_list(cell_type)):
        array = pa.array(rows, type=kind)
        for start, length in ((0, 5), (1, 4), (2, 1), (3, 2), (5, 0), (0, 2)):
            part = array.slice(start, length)
            found = [
                None
                if row is None
                else [c and {**c, "bytes": None if c["bytes"] is None else c["bytes"].to_pybytes()} for c in row]
                for row in _image_lists(part)
            ]
            assert found == part.to_pylist(), (start, length)
