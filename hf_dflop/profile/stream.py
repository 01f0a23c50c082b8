"""Streams: annotated lazily while they are read, profiled on some of their rows.

Input: an `IterableDataset` and an `Annotator`. Output: a stream with the shape columns, and the counts of the first
rows, or of random ones out of a seeded buffer; the rest of the stream is not read. Counts are those of the
map-style path: both run the same annotator on undecoded images.

Assumptions: a stream whose images were decoded by an earlier `map` is counted from the decoded pictures.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from hf_dflop.errors import DatasetError, StreamError
from hf_dflop.profile.annotate import ERROR_COLUMN, Annotator
from hf_dflop.profile.bad_rows import raise_first, reasons_of, row_errors
from hf_dflop.profile.counts import verify_row
from hf_dflop.profile.origin import with_annotation
from hf_dflop.profile.policy import Policy, marked, record_of, spec_of
from hf_dflop.profile.report import DatasetProfile
from hf_dflop.profile.source import undecoded
from hf_dflop.profile.tokens import TokenCounter
from hf_dflop.rows import detect_layout
from hf_dflop.shapes import COLUMN_PREFIX, SHAPE_COLUMNS, Shapes

__all__ = ["SAMPLINGS", "annotated_stream", "batches_of", "profile_stream", "sampled", "without_decoding_stream"]

logger = logging.getLogger(__name__)

SAMPLINGS = ("first", "random")
BUFFER_FACTOR = 10
"""Rows in the buffer from which random rows are drawn, for each row that is drawn."""
_BATCH_ROWS = 64
_STREAM_SAMPLES = 1000
"""Rows of a stream that are profiled when `max_samples` does not say."""


def profile_stream(stream: Any, policy: Policy, source: dict[str, Any]) -> tuple[Any, DatasetProfile]:
    """The annotated stream, and the profile of some of its rows."""
    if policy.shard is not None:
        raise DatasetError("a stream has no known number of rows to part; shard a map-style dataset")
    raw = without_decoding_stream(stream)
    max_samples = policy.max_samples or _STREAM_SAMPLES
    rows = sampled(raw, max_samples, policy.sample, policy.seed)
    columns: dict[str, list[Any]] = {name: [] for name in (*SHAPE_COLUMNS, ERROR_COLUMN)}
    annotator: Annotator | None = None
    broken: str | None = None
    batches = batches_of(rows)
    while True:
        try:
            batch = next(batches, None)
        except StreamError as error:
            if policy.on_error == "raise" or annotator is None:
                raise
            broken = str(error)
            logger.warning("%s", broken)
            break
        if batch is None:
            break
        start = len(columns[ERROR_COLUMN])
        if annotator is None:
            found = detect_layout(batch[0], raw.features, layout=policy.layout, image_column=policy.image_column)
            counter = TokenCounter(policy.processor, policy.config)
            annotator = Annotator(counter, found, policy.labels, policy.max_length, raises=policy.on_error == "raise")
        counted = annotator.annotate(batch, range(start, start + len(batch)))
        good = [i for i, reason in enumerate(counted[ERROR_COLUMN]) if reason is None]
        for i in good[: max(0, policy.verify - start)]:
            verify_row(batch[i], start + i, annotator)
        for name, values in counted.items():
            columns[name] += values
    if annotator is None:
        raise DatasetError("the stream has no rows")
    num_read = len(columns[ERROR_COLUMN])
    reasons = reasons_of(columns.pop(ERROR_COLUMN))
    shapes = Shapes.from_columns(columns)
    raise_first(reasons, len(shapes), policy.on_error)
    record = record_of(policy, annotator.layout)
    if policy.on_error == "skip":
        shapes = shapes.select(np.setdiff1d(np.arange(len(shapes)), list(reasons)))
    sampling = {
        "on_error": policy.on_error,
        "streamed": True,
        "max_samples": max_samples,
        "sample": policy.sample,
        "seed": policy.seed,
    }
    profile = DatasetProfile.from_shapes(
        shapes,
        provenance={**source, **sampling, **record},
        errors=row_errors(reasons | ({} if broken is None else {num_read: broken})),
        unusable=marked(policy, reasons),
        spec=spec_of(policy.config, shapes),
    )
    return annotated_stream(stream, raw, annotator, policy.on_error, record), profile


def without_decoding_stream(stream: Any) -> Any:
    """The stream without format and shape columns, its images undecoded where its features are known."""
    import datasets

    plain = stream.with_format(None)
    if plain.features is None:
        return plain
    plain = plain.decode(False)
    dropped = [column for column in plain.features if column.startswith(COLUMN_PREFIX)]
    plain = plain.remove_columns(dropped) if dropped else plain
    return plain.cast(datasets.Features({name: undecoded(feature) for name, feature in plain.features.items()}))


def sampled(raw: Any, max_samples: int, sample: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows that are profiled."""
    if sample == "random":
        raw = raw.shuffle(seed=seed, buffer_size=BUFFER_FACTOR * max_samples)
    return iter(raw.take(max_samples))


def batches_of(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows in lists, so that few of them are in memory at a time.

    Raises:
        StreamError: the stream broke; the rows before that were all given.
    """
    num_rows, failure = 0, None
    while failure is None:
        batch: list[dict[str, Any]] = []
        try:
            batch.extend(islice(rows, _BATCH_ROWS))  # what was read before an exception stays in the list
        except Exception as error:
            failure = error
        num_rows += len(batch)
        if batch:
            yield batch
        elif failure is None:
            return
    told = (str(failure).strip().splitlines() or [""])[0]
    raise StreamError(
        f"row {num_rows}: the stream broke after {num_rows} rows: {type(failure).__name__}: {told}. "
        "If the connection was lost, try again, or profile what was read with on_error='skip'"
    ) from failure


def annotated_stream(stream: Any, raw: Any, annotator: Annotator, on_error: str, record: dict[str, Any]) -> Any:
    """The stream with its shape columns, counted as rows pass by; images are decoded after counting, as before."""
    import datasets

    added = {name: datasets.Value("int64") for name in SHAPE_COLUMNS}
    if on_error == "mark":
        added[ERROR_COLUMN] = datasets.Value("string")
    # Mapped without features, since a typed map would leave the images undecoded for good.
    annotated = raw.map(_Pass(annotator, on_error), batched=True, batch_size=_BATCH_ROWS, with_indices=True)
    if raw.features is not None:
        kept = {name: feature for name, feature in stream.features.items() if name in raw.features}
        annotated = annotated.cast(datasets.Features({**kept, **added}))
    annotated.info.description = with_annotation(annotated.info.description, record)
    form = getattr(stream, "_formatting", None)
    return annotated if form is None else annotated.with_format(form.format_type)


class _Pass:
    """What `IterableDataset.map` calls with each batch."""

    def __init__(self, annotator: Annotator, on_error: str) -> None:
        self.annotator = annotator
        self.on_error = on_error

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        counted = self.annotator.annotate(rows, indices)
        reasons = counted.pop(ERROR_COLUMN)
        if self.on_error == "mark":
            return {**batch, **counted, ERROR_COLUMN: reasons}
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        return {name: [values[i] for i in kept] for name, values in {**batch, **counted}.items()}
