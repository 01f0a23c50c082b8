"""How much faster counting is than running the processor, on the same rows, in one run, with the same counts."""

import time
from statistics import median
from typing import Any

import datasets

import hf_dflop
from hf_dflop.rows import detect_layout, encode, read_row
from hf_dflop.shapes import Shapes

__all__ = ["measure_annotation"]


def measure_annotation(
    dataset: Any, processor: Any, config: Any, *, rows: int = 256, rounds: int = 3
) -> dict[str, Any]:
    """Time `profile_dataset` without its cache against the processor, alternating, and compare what they count.

    Returns:
        `dict`: milliseconds per sample of both, their ratio by round, and whether all counts agreed.
    """
    part = dataset.select(range(min(rows, len(dataset))))
    counting, processing = [], []
    agreed = True
    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        hf_dflop.profile_dataset(part.select(range(8)), processor, config=config)  # import and warm up
        for _ in range(rounds):
            start = time.perf_counter()
            annotated, _ = hf_dflop.profile_dataset(part, processor, config=config, verify=0)
            counting.append((time.perf_counter() - start) / len(part) * 1e3)
            start = time.perf_counter()
            layout = detect_layout(part[0], part.features)
            lengths, labels = [], []
            for row in part:
                batch = encode(processor, [read_row(row, layout)])
                lengths.append(batch["input_ids"].shape[1])
                labels.append(int((batch["labels"][:, 1:] != -100).sum()))
            processing.append((time.perf_counter() - start) / len(part) * 1e3)
            shapes = Shapes.of_dataset(annotated)
            agreed &= shapes.llm_tokens.tolist() == lengths and shapes.label_tokens.tolist() == labels
    finally:
        datasets.enable_caching()
        datasets.enable_progress_bars()
    ratios = [slow / fast for slow, fast in zip(processing, counting, strict=True)]
    return {
        "rows": len(part),
        "annotate_ms_per_sample": median(counting),
        "process_ms_per_sample": median(processing),
        "annotate_speedup": median(ratios),
        "annotate_speedup_rounds": ratios,
        "annotate_same_counts": agreed,
    }
