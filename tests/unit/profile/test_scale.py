"""Memory does not grow with the rows, and short texts are counted in a fraction of a millisecond.

`python -m recipes.benchmarks.annotation` measures both at full size.
"""

import gc
import time
import tracemalloc
from typing import Any

import datasets
import pytest

from hf_dflop.profile import counts, profile_dataset
from tests.unit.rows import tiny


def short_texts(num_rows: int) -> datasets.Dataset:
    questions = [f"What is in the image {i}?" for i in range(num_rows)]
    answers = ["the sea " * (1 + i % 12) for i in range(num_rows)]
    return datasets.Dataset.from_dict({"question": questions, "answer": answers})


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, peaks = tiny.llava(), {}
    count = counts._count

    def collected(*args: Any) -> Any:
        gc.collect()  # so that cycles that wait for the collector do not add up
        return count(*args)

    monkeypatch.setattr(counts, "CHUNK_ROWS", 500)
    monkeypatch.setattr(counts, "_count", collected)
    profile_dataset(short_texts(64), processor)
    for num_rows in (600, 4200):
        data = short_texts(num_rows)
        tracemalloc.start()
        profile_dataset(data, processor, verify=0)
        peaks[num_rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # The counts alone are 104 bytes, the text and the tokens of a row over 2,000; garbage makes the peaks uneven.
    assert (peaks[4200] - peaks[600]) / 3600 < 52, peaks


def test_short_texts_are_counted_quickly() -> None:
    data, processor = short_texts(4000), tiny.llava()
    profile_dataset(data.select(range(64)), processor)
    start = time.process_time()
    profile_dataset(data, processor, verify=0)
    assert len(data) / (time.process_time() - start) > 1500  # a third of what a busy core does
