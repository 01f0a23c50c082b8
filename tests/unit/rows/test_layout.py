"""Every way of writing a sample reads as the same row; what does not fit is named."""

from typing import Any

import datasets
import pytest

from hf_dflop.errors import DatasetError
from hf_dflop.rows import Layout, detect_layout, read_row

IMAGE = {"type": "image"}
CELL = {"bytes": b"x", "path": None}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def read(row: dict[str, Any], **options: Any) -> Any:
    return read_row(row, detect_layout(row, **options), index=3)


EXPECTED = [
    {"role": "user", "content": [IMAGE, text("What is it?")]},
    {"role": "assistant", "content": [text("A cat.")]},
]
SAME: list[dict[str, Any]] = [
    {"messages": EXPECTED, "images": [CELL]},
    {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, EXPECTED[1]], "image": CELL},
    {"messages": [{"role": "user", "content": "What is it?"}, EXPECTED[1]], "images": [CELL]},
    {
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}],
        "image": CELL,
    },
    {"texts": [{"user": "What is it?", "assistant": "A cat.", "source": "x"}], "images": [CELL]},
    {"image": CELL, "question": "What is it?", "answer": "A cat."},
    {"image": CELL, "query": "What is it?", "answers": ["A cat.", "Cat."]},
    {"prompt": EXPECTED[:1], "completion": EXPECTED[1:], "images": [CELL]},
    {"messages": [{"role": "user", "content": [{**IMAGE, "image": CELL}, text("What is it?")]}, EXPECTED[1]]},
    # What `datasets` makes of structs with different keys: the missing ones are None.
    {
        "messages": [{"role": "user", "content": [{**IMAGE, "text": None}, text("What is it?")]}, EXPECTED[1]],
        "img": CELL,
    },
    # A struct of lists, as older files hold.
    {"conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhat is it?", "A cat."]}, "image": CELL},
]


@pytest.mark.parametrize("row", SAME)
def test_layouts_read_the_same(row: dict[str, Any]) -> None:
    found = read(row)
    assert found.messages == EXPECTED
    assert found.images == [CELL]


def test_captions_and_documents() -> None:
    found = read({"image": CELL, "caption": "A cat."})
    assert found.messages == [{"role": "user", "content": [IMAGE]}, EXPECTED[1]]
    found = read({"images": [CELL, CELL], "text": "One<image>two\n<image>"})
    assert found.messages == [{"role": "assistant", "content": [text("One"), IMAGE, text("two"), IMAGE]}]


def test_a_row_without_image() -> None:
    assert read({"image": None, "question": "Why?", "answer": "So."}).images == []


def test_the_users_own_function() -> None:
    row = {"q": "What is it?", "a": "A cat.", "pic": CELL}
    found = read(
        row,
        layout=lambda r: {
            "messages": [{"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]}],
            "images": [r["pic"]],
        },
    )
    assert (found.messages, found.images) == (EXPECTED, [CELL])
    with pytest.raises(DatasetError, match="row 3: the layout function returned str"):
        read(row, layout=lambda r: "no")


def test_features_decide_where_the_first_row_is_empty() -> None:
    features = datasets.Features(
        {
            "talk": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
            "photos": datasets.List(datasets.Image()),
        }
    )
    found = detect_layout({"talk": [], "photos": []}, features)
    assert found == Layout(kind="texts", text_columns=("talk",), image_column="photos")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (SAME[0], {"image_column": "imgaes"}, "no image column 'imgaes'.*did you mean image_column='images'"),
        (
            {"messages": EXPECTED, "imgs": [1]},
            {},
            r"row 3: 1 image placeholders but 0 images; no image column.*'imgs'",
        ),
        ({"messages": EXPECTED, "images": [CELL, CELL]}, {}, "row 3: 1 image placeholders but 2 images"),
        ({"a": 1, "b": "x"}, {}, r"columns \['a', 'b'\] fit no known layout"),
        ({"chosen": EXPECTED, "rejected": EXPECTED}, {}, "all hold turns"),
        ({"a": CELL, "b": CELL, "text": "x"}, {}, r"columns \['a', 'b'\] all hold images"),
        (SAME[0], {"layout": "massages"}, "unknown layout 'massages'"),
        ({"messages": [{"role": "cat", "content": ""}]}, {}, "row 3: unknown role 'cat'"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, {}, "content part of type 'smell'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, {}, "1 audio placeholders but 0 audios"),
        ({"question": "x", "answer": 3}, {}, "row 3: column 'answer' holds int"),
    ],
)
def test_errors_name_what_was_found(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(row, **options)
