"""`profile_dataset`: a dataset in, the dataset with its shape columns and a `DatasetProfile` out.

Order of work: a few random rows are counted and really processed first, and a mismatch stops here; then all rows
are counted from headers and text. Images are not decoded and the rows are not copied: the seven columns are
counted into a small table and joined to the dataset's own table, whatever select or shuffle lies on top of it.

The counts are cached in the cache folder of `datasets` under a key of the dataset's fingerprint, the processor's
fingerprint and the policy, so that a second call, in any process and with any number of workers, reads them. Bad
rows are cached with their reasons, whatever `on_error` says.

Assumptions: rows are what the stored columns hold; a transform set with `with_transform` is put back on the
returned dataset, and is not applied while counting.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_dflop.cost import ModelSpec
from hf_dflop.errors import DatasetError, ModelError, ShapeMismatchError
from hf_dflop.profile.annotate import ERROR_COLUMN, Annotator
from hf_dflop.profile.bad_rows import check_on_error, raise_first, reasons_of, row_errors
from hf_dflop.profile.origin import annotation_of, processor_fingerprint, with_annotation
from hf_dflop.profile.report import DatasetProfile
from hf_dflop.profile.source import load_processor, open_dataset, without_decoding
from hf_dflop.profile.stream import SAMPLINGS, annotated_stream, batches_of, sampled, without_decoding_stream
from hf_dflop.profile.subset import find_subsets
from hf_dflop.profile.tokens import TokenCounter
from hf_dflop.profile.verify import check_row
from hf_dflop.rows import Layout, detect_layout, read_row
from hf_dflop.shapes import COLUMN_PREFIX, SHAPE_COLUMNS, Shapes

__all__ = ["profile_dataset"]

logger = logging.getLogger(__name__)

_BATCH_ROWS = 512
_LOOKED_AT = 64
"""Rows in which the layout is looked for, when the first ones are not readable."""
_STREAM_SAMPLES = 1000
"""Rows of a stream that are profiled when `max_samples` does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Policy:
    """What `profile_dataset` was told, for one split."""

    processor: Any
    config: Any
    layout: str | Callable[[dict[str, Any]], Mapping[str, Any]]
    image_column: str | None
    labels: str
    max_length: int | None
    num_proc: int | None
    verify: int
    seed: int
    on_error: str
    max_samples: int | None
    sample: str
    shard: tuple[int, int] | None
    source: dict[str, Any]


def profile_dataset(
    dataset: Any,
    processor: Any,
    *,
    config: Any = None,
    layout: str | Callable[[dict[str, Any]], Mapping[str, Any]] = "auto",
    image_column: str | None = None,
    labels: str = "assistant",
    max_length: int | None = None,
    num_proc: int | None = None,
    verify: int = 8,
    seed: int = 0,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    on_error: str = "raise",
    max_samples: int | None = None,
    sample: str = "first",
    streaming: bool = False,
    shard: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """Count patches, image tokens, text tokens and label tokens of every sample, without decoding images.

    Args:
        dataset (`Dataset`, `DatasetDict`, `IterableDataset`, `IterableDatasetDict` or `str`): a dataset, the id of
            one on the Hub, or a local path: a folder written by `save_to_disk`, a folder that `load_dataset` reads
            (parquet, json, imagefolder, webdataset), or one such file.
        processor (`ProcessorMixin` or `str`): the model's processor, or its id or path.
        config (`PreTrainedConfig`, *optional*): configuration of the model, for the encoder's patch size where the
            processor does not know it, and for the costs in the report. Loaded from the same id when `processor` is
            one.
        layout (`str` or `Callable`, defaults to `"auto"`): how rows are written; see `hf_dflop.rows.layout`.
        image_column (`str`, *optional*): column of the images.
        labels (`str`, defaults to `"assistant"`): what is learned: "assistant" turns, or "all" text.
        max_length (`int`, *optional*): samples are cut to this many tokens. A cut through an image is an error.
        num_proc (`int`, *optional*): worker processes.
        verify (`int`, defaults to 8): rows to process really and compare, before anything is written.
        seed (`int`, defaults to 0): which rows those are, and which rows `sample="random"` takes.
        name, split, revision (`str`, *optional*): for `load_dataset`, when `dataset` is an id or a path; `split`
            also picks a split of a `DatasetDict`.
        on_error (`str`, defaults to `"raise"`): what becomes of rows that are not usable: "raise", "skip" (dropped)
            or "mark" (kept with counts of 0 and the reason in the column `dflop_error`). Either way they are listed
            in `DatasetProfile.errors`.
        max_samples (`int`, *optional*): rows to look at. Of a map-style dataset, only these are annotated and
            returned; of a stream, only these are profiled (1000 by default), and all are annotated as they pass.
        sample (`str`, defaults to `"first"`): which rows those are: the "first" ones, or "random" ones (of a stream,
            drawn with a buffer of 10 × `max_samples` rows).
        streaming (`bool`, defaults to `False`): open an id or path as a stream.
        shard (`tuple[int, int]`, *optional*): (i, n): only the i-th of n consecutive parts of the rows, counted from
            0. The profiles of all parts make the whole one: `DatasetProfile.merge`.

    Returns:
        `tuple`: the dataset with the seven columns of `hf_dflop.Shapes` added, and its `DatasetProfile`. A
        `DatasetDict`, or an id or path with several splits of which none was picked, gives a `DatasetDict` and a
        `dict` of profiles. A stream gives a stream that is annotated as it is read.

    Raises:
        DatasetError: a row is not usable; names its index, the column and the cause.
        ProcessorError: the processor cannot count.
        ShapeMismatchError: a really processed row differs from its counts.
        ValueError: an unknown policy.

    Example:
        >>> ds, profile = profile_dataset(ds, "HuggingFaceTB/SmolVLM-256M-Instruct")    # doctest: +SKIP
        >>> print(profile.summary())                                                    # doctest: +SKIP
    """
    check_on_error(on_error)
    if sample not in SAMPLINGS:
        raise ValueError(f"unknown sample {sample!r}; choose one of {', '.join(map(repr, SAMPLINGS))}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; it must be at least 1")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard is {shard[0]} of {shard[1]}; it must be (i, n) with 0 <= i < n")
    if shard is not None and max_samples is not None:
        raise ValueError("shard and max_samples do not go together; pass one of them")
    named = isinstance(dataset, str | os.PathLike)
    opened = open_dataset(dataset, name, split, revision, streaming)
    loaded, config = load_processor(processor, config)
    policy = _Policy(
        processor=loaded,
        config=config,
        layout=layout,
        image_column=image_column,
        labels=labels,
        max_length=max_length,
        num_proc=num_proc,
        verify=verify,
        seed=seed,
        on_error=on_error,
        max_samples=max_samples,
        sample=sample,
        shard=shard,
        source={
            "dataset": str(dataset) if named else None,
            "name": name,
            "split": split,
            "revision": revision,
            "model": str(processor) if isinstance(processor, str | os.PathLike) else None,
        },
    )
    if not isinstance(opened, dict):
        return _profile_split(opened, policy, None)
    parts = {key: _profile_split(part, policy, str(key)) for key, part in opened.items()}
    return type(opened)({key: part for key, (part, _) in parts.items()}), {key: p for key, (_, p) in parts.items()}


def _profile_split(data: Any, policy: _Policy, split: str | None) -> tuple[Any, DatasetProfile]:
    import datasets

    source = {**policy.source, "split": split or policy.source["split"] or str(data.split)}
    try:
        if isinstance(data, datasets.IterableDataset):
            return _profile_stream(data, policy, source)
        return _profile_rows(data, policy, source)
    except DatasetError as error:
        if split is None:
            raise
        raise type(error)(f"split {split!r}: {error}") from error


def _profile_rows(data: Any, policy: _Policy, source: dict[str, Any]) -> tuple[Any, DatasetProfile]:
    if not len(data):
        raise DatasetError("the dataset has no rows")
    picked: Any = None
    source = {**source, "on_error": policy.on_error}
    if policy.shard is not None:
        part, num_parts = policy.shard
        source |= {"shard": [part, num_parts], "num_rows": len(data)}
        picked = range(len(data) * part // num_parts, len(data) * (part + 1) // num_parts)
        if not picked:
            raise DatasetError(
                f"part {part} of {num_parts} of a dataset of {len(data)} rows is empty; use fewer parts"
            )
    elif policy.max_samples is not None and policy.max_samples < len(data):
        picked = range(policy.max_samples)
        if policy.sample == "random":
            picked = np.sort(np.random.default_rng(policy.seed).permutation(len(data))[: policy.max_samples])
    if picked is not None:
        data = data.select(picked)
    raw = without_decoding(data)
    found = _find_layout(raw, policy)
    record = _record(policy, found)
    if annotation_of(data) == record:
        plain = data.with_format(None)
        shapes = Shapes.of_dataset(data)
        reasons = reasons_of(plain[ERROR_COLUMN][:]) if ERROR_COLUMN in data.column_names else {}
        raise_first(reasons, len(data), policy.on_error)
        annotated = data if (ERROR_COLUMN in data.column_names) == (policy.on_error == "mark") else None
    else:
        shapes, reasons = _cached_counts(raw, policy, found, record)
        raise_first(reasons, len(data), policy.on_error)
        annotated = None
    if annotated is None:
        annotated = _join(data, shapes, record, reasons if policy.on_error == "mark" else None)
    names, subset = find_subsets(raw)
    usable = np.setdiff1d(np.arange(len(data)), np.fromiter(reasons, dtype=np.int64, count=len(reasons)))
    if reasons and policy.on_error == "skip":
        annotated, shapes = annotated.select(usable), shapes.select(usable)
        subset = None if subset is None else subset[usable]
    profile = DatasetProfile.from_shapes(
        shapes,
        provenance={**source, **record},
        errors=row_errors(reasons, picked),
        unusable=_marked(policy, reasons),
        spec=_spec(policy.config),
        subset_names=names,
        subset=subset,
    )
    return annotated, profile


def _profile_stream(stream: Any, policy: _Policy, source: dict[str, Any]) -> tuple[Any, DatasetProfile]:
    if policy.shard is not None:
        raise DatasetError("a stream has no known number of rows to part; shard a map-style dataset")
    raw = without_decoding_stream(stream)
    max_samples = policy.max_samples or _STREAM_SAMPLES
    rows = sampled(raw, max_samples, policy.sample, policy.seed)
    columns: dict[str, list[Any]] = {name: [] for name in (*SHAPE_COLUMNS, ERROR_COLUMN)}
    annotator: Annotator | None = None
    for batch in batches_of(rows):
        start = len(columns[ERROR_COLUMN])
        if annotator is None:
            found = detect_layout(batch[0], raw.features, layout=policy.layout, image_column=policy.image_column)
            counter = TokenCounter(policy.processor, policy.config)
            annotator = Annotator(counter, found, policy.labels, policy.max_length, raises=policy.on_error == "raise")
        counted = annotator.annotate(batch, range(start, start + len(batch)))
        good = [i for i, reason in enumerate(counted[ERROR_COLUMN]) if reason is None]
        for i in good[: max(0, policy.verify - start)]:
            _verify_row(batch[i], start + i, annotator)
        for name, values in counted.items():
            columns[name] += values
    if annotator is None:
        raise DatasetError("the stream has no rows")
    reasons = reasons_of(columns.pop(ERROR_COLUMN))
    shapes = Shapes.from_columns(columns)
    raise_first(reasons, len(shapes), policy.on_error)
    record = _record(policy, annotator.layout)
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
        errors=row_errors(reasons),
        unusable=_marked(policy, reasons),
        spec=_spec(policy.config),
    )
    return annotated_stream(stream, raw, annotator, policy.on_error, record), profile


def _spec(config: Any) -> ModelSpec | None:
    """The model's structure, where its config is known and understood."""
    if config is None:
        return None
    try:
        return ModelSpec.from_config(config)
    except (ModelError, AttributeError, TypeError) as error:
        logger.warning("costs cannot be computed from this config: %s", error)
        return None


def _marked(policy: _Policy, reasons: Mapping[int, str]) -> list[int]:
    """Rows of the returned dataset whose counts of 0 mean nothing."""
    return sorted(reasons) if policy.on_error == "mark" else []


def _record(policy: _Policy, layout: Layout) -> dict[str, Any]:
    """What the columns are counted with; kept with the dataset."""
    record = {
        "processor": processor_fingerprint(policy.processor, policy.labels, policy.max_length),
        "processor_class": type(policy.processor).__name__,
        "patch_size": getattr(getattr(policy.config, "vision_config", None), "patch_size", None),
        "labels": policy.labels,
        "max_length": policy.max_length,
        "layout": layout.kind,
        "layout_columns": None if layout.function else list(layout.columns or ()),
        "layout_function": _function_hash(layout),
        "image_column": layout.image_column,
    }
    return dict(json.loads(json.dumps(record)))  # as it is read back from the dataset: tuples are lists


def _find_layout(raw: Any, policy: _Policy) -> Layout:
    """The layout, from the first row that can be read."""
    first: Exception | None = None
    for index in range(min(len(raw), _LOOKED_AT)):
        try:
            return detect_layout(raw[index], raw.features, layout=policy.layout, image_column=policy.image_column)
        except Exception as error:
            first = first or error
            if policy.on_error == "raise":
                break
    assert first is not None
    if isinstance(first, DatasetError):
        raise first
    raise DatasetError(f"row 0: cannot be read: {type(first).__name__}: {first}") from first


def _cached_counts(raw: Any, policy: _Policy, layout: Layout, record: dict[str, Any]) -> tuple[Shapes, dict[int, str]]:
    """The counts of all rows, and the reasons of the bad ones."""
    import datasets
    import transformers

    parts = [raw._fingerprint, len(raw), transformers.__version__, record]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_dflop" / f"{key}.npz"
    if datasets.is_caching_enabled() and path.exists():
        with np.load(path, allow_pickle=False) as file:
            if "reasons" in file and int(file["verified"]) >= min(policy.verify, len(raw)):
                logger.info("shape columns read from %s", path)
                reasons = dict(zip(file["bad_rows"].tolist(), file["reasons"].tolist(), strict=True))
                return Shapes.from_columns({column: file[column] for column in SHAPE_COLUMNS}), reasons
    counter = TokenCounter(policy.processor, policy.config)
    annotator = Annotator(counter, layout, policy.labels, policy.max_length, raises=policy.on_error == "raise")
    damaged = _verify(raw, annotator, policy)
    narrow = raw if layout.columns is None else raw.select_columns(list(layout.columns))
    features = {column: datasets.Value("int64") for column in SHAPE_COLUMNS}
    counted = narrow.with_format("arrow").map(
        annotator,
        batched=True,
        batch_size=_BATCH_ROWS,
        with_indices=True,
        remove_columns=narrow.column_names,
        features=datasets.Features({**features, ERROR_COLUMN: datasets.Value("string")}),
        num_proc=policy.num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=key,
        desc="Counting tokens",
    )
    reasons = {**damaged, **reasons_of(counted.with_format(None)[ERROR_COLUMN][:])}
    columns = {
        name: np.array(values) for name, values in counted.with_format("numpy", columns=list(features))[:].items()
    }
    for values in columns.values():
        values[list(damaged)] = 0
    shapes = Shapes.from_columns(columns)
    if datasets.is_caching_enabled():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{key}.{os.getpid()}.npz")
        arrays: dict[str, Any] = {
            "verified": np.int64(min(policy.verify, len(raw))),
            "bad_rows": np.fromiter(reasons, dtype=np.int64, count=len(reasons)),
            "reasons": np.array(list(reasons.values()), dtype=np.str_),
            **shapes.to_columns(),
        }
        np.savez_compressed(unfinished, **arrays)
        unfinished.replace(path)
    return shapes, reasons


def _verify(raw: Any, annotator: Annotator, policy: _Policy) -> dict[int, str]:
    """Really process a few rows; the reasons of those that turn out to be damaged (unless they raise)."""
    picked = np.random.default_rng(policy.seed).permutation(len(raw))[: policy.verify]
    damaged = {}
    for index in sorted(int(i) for i in picked):
        try:
            _verify_row(raw[index], index, annotator)
        except ShapeMismatchError:
            raise
        except Exception as error:
            if annotator.raises:
                raise
            damaged[index] = str(error) if isinstance(error, DatasetError) else f"row {index}: {error}"
    return damaged


def _verify_row(row: Mapping[str, Any], index: int, annotator: Annotator) -> None:
    read = read_row(row, annotator.layout, index=index)
    counter = annotator.counter
    counted = annotator.count([read])[0]
    check_row(counter.processor, read, counted, counter, annotator.renderer, annotator.max_length)


def _join(data: Any, shapes: Shapes, record: dict[str, Any], reasons: Mapping[int, str] | None = None) -> Any:
    """The dataset with the columns added, without copying its rows; the given dataset is left as it is."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, concat_tables

    dropped = [column for column in data.column_names if column.startswith(COLUMN_PREFIX)]
    plain = data.remove_columns(dropped)
    columns: dict[str, Any] = dict(shapes.to_columns())
    where = np.arange(len(shapes))
    if plain._indices is not None:
        # Under a select or shuffle, row i lies at table row indices[i]; rows that are not selected stay 0, unseen.
        where = plain._indices.column("indices").to_numpy()
        scattered = {name: np.zeros(len(plain.data), np.int64) for name in columns}
        for name, values in columns.items():
            scattered[name][where] = values
        columns = scattered
    arrays = {name: pa.array(values) for name, values in columns.items()}
    types = {name: datasets.Value("int64") for name in SHAPE_COLUMNS}
    if reasons is not None:
        marked = {int(where[index]): reason for index, reason in reasons.items()}
        arrays[ERROR_COLUMN] = pa.array([marked.get(i) for i in range(len(plain.data))], type=pa.string())
        types[ERROR_COLUMN] = datasets.Value("string")
    added = InMemoryTable(pa.table(arrays))
    info = copy.deepcopy(plain.info)
    info.features = datasets.Features({**plain.features, **types})
    info.description = with_annotation(info.description, record)
    marks = [] if reasons is None else [sorted(reasons)]
    origin = json.dumps([plain._fingerprint, record, *marks], sort_keys=True).encode()
    annotated = datasets.Dataset(
        concat_tables([plain.data, added], axis=1),
        info=info,
        split=plain.split,
        indices_table=plain._indices,
        fingerprint=hashlib.sha256(origin).hexdigest()[:16],
    )
    form = plain.format
    if form["type"] is not None:
        names = form["columns"] if set(form["columns"]) != set(plain.column_names) else None
        annotated.set_format(form["type"], names, form["output_all_columns"], **form["format_kwargs"])
    return annotated


def _function_hash(layout: Layout) -> str | None:
    from datasets.fingerprint import Hasher

    return None if layout.function is None else str(Hasher.hash(layout.function))
