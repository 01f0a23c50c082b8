import numpy as np
import pytest
from datasets import Dataset

from hf_dflop.errors import DatasetError
from hf_dflop.shapes import SHAPE_COLUMNS, Shapes


def _shapes(**changes: object) -> Shapes:
    fields = {name.removeprefix("dflop_"): [1, 2, 3] for name in SHAPE_COLUMNS}
    return Shapes(**{**fields, **changes})  # type: ignore[arg-type]


def test_llm_tokens_are_image_and_text_tokens() -> None:
    shapes = _shapes(image_tokens=[4, 0, 8], text_tokens=[10, 20, 30], audio_tokens=[1, 2, 0])
    assert shapes.llm_tokens.tolist() == [15, 22, 38]
    assert shapes.select([2, 0]).llm_tokens.tolist() == [38, 15]
    assert len(shapes) == 3


def test_columns_round_trip_through_a_shuffled_dataset() -> None:
    shapes = _shapes(text_tokens=[10, 20, 30])
    dataset = Dataset.from_dict({name: column.tolist() for name, column in shapes.to_columns().items()})
    assert Shapes.of_dataset(dataset).text_tokens.tolist() == [10, 20, 30]
    picked = dataset.select([2, 1]).with_transform(lambda rows: {"other": [0] * len(rows[SHAPE_COLUMNS[0]])})
    assert Shapes.of_dataset(picked).text_tokens.tolist() == [30, 20]
    assert Shapes.of_dataset(dataset).text_tokens.dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_tokens": [1, 2]}, "different lengths"),
        ({"text_tokens": [1, -2, 3]}, "-2 at sample 1"),
        ({"text_tokens": [1.5, 2.0, 3.0]}, "whole numbers"),
        ({"text_tokens": [[1], [2], [3]]}, "2 dimensions"),
    ],
)
def test_bad_columns_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        _shapes(**changes)


def test_a_dataset_without_annotation_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"dflop_num_images.*profile_dataset"):
        Shapes.of_dataset(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DatasetError, match="got list"):
        Shapes.of_dataset([1, 2])
    with pytest.raises(DatasetError, match="dflop_num_images"):
        Shapes.from_columns({})
