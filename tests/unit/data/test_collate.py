"""Microbatches: what the model gets, and the check against the shape columns."""

from io import BytesIO
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from hf_dflop.data import VisionLanguageCollator
from hf_dflop.errors import DatasetError, ProcessorError, ShapeMismatchError
from hf_dflop.profile import profile_dataset
from tests.unit.rows import tiny


def cell(width: int, height: int) -> dict[str, Any]:
    file = BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = [
    {"messages": talk("<image>What is it?", "the sea"), "images": [cell(60, 40)]},
    {"messages": talk("hi", "the picture shows nothing " * 3), "images": []},
    {"messages": talk("<image><image>both?", "yes"), "images": [cell(30, 90), cell(200, 50)]},
]


@pytest.mark.parametrize("build", [b for b in tiny.PROCESSORS if b is not tiny.paligemma], ids=lambda b: b.__name__)
def test_a_mixed_batch_equals_its_rows(build: Any) -> None:
    collate = VisionLanguageCollator(build())
    batch = collate(ROWS)
    image_id = collate.renderer.token.feature_id
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"][batch["input_ids"] == image_id] == -100).all()
    for i, row in enumerate(ROWS):
        alone = collate([row])
        length = alone["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[key][i, :length], alone[key][0]), key
            assert batch["attention_mask"][i, length:].sum() == 0
        decoded = collate.processor.tokenizer.decode(alone["labels"][alone["labels"] != -100])
        assert decoded == row["messages"][1]["content"].rstrip() + (" " if i == 1 else "") + "<|im_end|>"
    assert batch["pixel_values"].shape[0] >= 2


@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_vl, tiny.idefics3, tiny.gemma3], ids=lambda b: b.__name__)
def test_text_only_batches_have_no_pixels(build: Any) -> None:
    batch = VisionLanguageCollator(build())([ROWS[1], ROWS[1]])
    assert not [key for key in batch if "pixel" in key or "image" in key]
    assert batch["input_ids"].shape[0] == 2


def test_decoded_and_encoded_images_give_the_same_batch() -> None:
    collate = VisionLanguageCollator(tiny.llava())
    decoded = [{**row, "images": [Image.open(BytesIO(c["bytes"])) for c in row["images"]]} for row in ROWS]
    one, other = collate(ROWS), collate(decoded)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_padding_to_a_multiple() -> None:
    assert VisionLanguageCollator(tiny.llava(), pad_to_multiple_of=64)(ROWS)["labels"].shape[1] % 64 == 0


def test_paligemma_learns_the_suffix() -> None:
    collate = VisionLanguageCollator(tiny.paligemma())
    rows = [
        {"question": "what?", "answer": "the sea", "image": cell(60, 40)},
        {"question": "and why is it so", "answer": "so", "image": cell(60, 40)},
    ]
    batch = collate(rows)
    learned = [collate.processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["the sea</s>", "so</s>"]
    assert (batch["token_type_ids"] == (batch["labels"] != -100)).all()


def test_interleaved_document_learns_text_only() -> None:
    collate = VisionLanguageCollator(tiny.idefics3())
    row = {"text": "the sea<image>a photo", "images": [cell(200, 50)]}
    labels = collate([row])["labels"]
    assert collate.processor.tokenizer.decode(labels[labels != -100]) == "the seaa photo<|im_end|>"


def test_samples_are_checked_against_their_columns() -> None:
    data = datasets.Dataset.from_list(ROWS)
    annotated, _ = profile_dataset(data, tiny.llava(), verify=0)
    rows = [annotated[i] for i in range(3)]
    VisionLanguageCollator(tiny.llava())(rows)
    with pytest.raises(ShapeMismatchError, match=r"row 0 of the microbatch has \d+ label tokens.*dflop_label_tokens"):
        VisionLanguageCollator(tiny.llava(), labels="all")(rows[1:])
    with pytest.raises(ShapeMismatchError, match=r"row 0 of the microbatch has \d+ image tokens.*says 16"):
        VisionLanguageCollator(tiny.qwen2_vl())(rows)


def test_errors_name_the_row() -> None:
    collate = VisionLanguageCollator(tiny.llava())
    with pytest.raises(DatasetError, match="row 1: 2 image placeholders but 1 images"):
        collate([ROWS[0], {**ROWS[2], "images": [cell(9, 9)]}])
    with pytest.raises(DatasetError, match="row 1, image 0: the image cannot be read"):
        collate([ROWS[0], {**ROWS[0], "images": [{"bytes": b"no", "path": None}]}])
    with pytest.raises(DatasetError, match="no rows"):
        collate([])
    processor = tiny.llava()
    processor.tokenizer.pad_token = None
    with pytest.raises(ProcessorError, match="no pad token"):
        VisionLanguageCollator(processor)(ROWS)


@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_vl, tiny.idefics3, tiny.gemma3], ids=lambda b: b.__name__)
def test_a_dummy_image_for_a_microbatch_without_images(build: Any) -> None:
    plain, dummy = VisionLanguageCollator(build()), VisionLanguageCollator(build(), labels="all", dummy_image=True)
    for rows in (ROWS, ROWS[:1]):
        assert dummy(rows)["input_ids"].shape[0] == len(rows), "there is an image already"
    batch, alone = dummy([ROWS[1], ROWS[1]]), plain([ROWS[1], ROWS[1]])
    assert batch["input_ids"].shape[0] == 3
    assert (batch["labels"][-1] == -100).all()
    assert (batch["labels"][:2] != -100).any()
    assert (batch["input_ids"][-1] == plain.renderer.token.feature_id).any()
    assert batch["pixel_values"].isfinite().all()
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:2, :length], alone["input_ids"])
    assert batch["attention_mask"][:2, length:].sum() == 0


def test_a_dummy_image_has_no_columns_to_be_checked() -> None:
    annotated, _ = profile_dataset(datasets.Dataset.from_list(ROWS), tiny.llava(), verify=0)
    assert VisionLanguageCollator(tiny.llava(), dummy_image=True)([annotated[1]])["input_ids"].shape[0] == 2


def test_the_gradient_of_a_dummy_image_is_exactly_zero() -> None:
    from tests.distributed.chats import chat_processor, model

    net = model(chat_processor())
    rows = [ROWS[1], {"messages": talk("why?", "it is so"), "images": []}]
    plain, dummy = VisionLanguageCollator(chat_processor()), VisionLanguageCollator(chat_processor(), dummy_image=True)
    gradients = []
    for collate in (plain, dummy):
        net.zero_grad()
        batch = collate(rows)
        count = (batch["labels"][:, 1:] != -100).sum()
        net(**batch, num_items_in_batch=count).loss.backward()
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()})
    seen = [name for name in gradients[0] if gradients[0][name] is None and gradients[1][name] is not None]
    assert any("vision_tower" in name for name in seen)
    assert any("multi_modal_projector" in name for name in seen)
    assert all(not gradients[1][name].any() for name in seen), "not exactly zero"
    learned = [name for name in gradients[0] if gradients[0][name] is not None]
    assert all(torch.allclose(gradients[0][n], gradients[1][n], rtol=1e-5, atol=1e-8) for n in learned)
