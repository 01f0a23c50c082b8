"""`profile_dataset`: a dataset in, the dataset with its shape columns and a `DatasetProfile` out.

Order of work: a few random rows are counted and really processed first, and a mismatch stops here; then all rows
are counted from headers and text. Images are not decoded and the rows are not copied: the seven columns are
counted into a small table and joined to the dataset's own table, whatever select or shuffle lies on top of it.

The counts are cached in the cache folder of `datasets` under a key of the dataset's fingerprint, the processor's
fingerprint and the policy, so that a second call, in any process and with any number of workers, reads them.

Assumptions: rows are what the stored columns hold; a transform set with `with_transform` is put back on the
returned dataset, and is not applied while counting.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_dflop.errors import DatasetError
from hf_dflop.profile.annotate import Annotator
from hf_dflop.profile.origin import annotation_of, processor_fingerprint, with_annotation
from hf_dflop.profile.report import DatasetProfile
from hf_dflop.profile.tokens import TokenCounter
from hf_dflop.profile.verify import check_row
from hf_dflop.rows import Layout, detect_layout, read_row
from hf_dflop.shapes import COLUMN_PREFIX, SHAPE_COLUMNS, Shapes

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["profile_dataset"]

logger = logging.getLogger(__name__)

_BATCH_ROWS = 64


def profile_dataset(
    dataset: "Dataset | str | os.PathLike[str]",
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
) -> "tuple[Dataset, DatasetProfile]":
    """Count patches, image tokens, text tokens and label tokens of every sample, without decoding images.

    Args:
        dataset (`datasets.Dataset` or `str`): a dataset, the id of one on the Hub, or a local path
            (written by `save_to_disk`, or anything that `load_dataset` reads).
        processor (`ProcessorMixin` or `str`): the model's processor, or its id or path.
        config (`PreTrainedConfig`, *optional*): configuration of the model, where the processor does not know the
            encoder's patch size. Loaded from the same id when `processor` is one.
        layout (`str` or `Callable`, defaults to `"auto"`): how rows are written; see `hf_dflop.rows.layout`.
        image_column (`str`, *optional*): column of the images.
        labels (`str`, defaults to `"assistant"`): what is learned: "assistant" turns, or "all" text.
        max_length (`int`, *optional*): samples are cut to this many tokens. A cut through an image is an error.
        num_proc (`int`, *optional*): worker processes.
        verify (`int`, defaults to 8): rows to process really and compare, before anything is written.
        seed (`int`, defaults to 0): which rows those are.
        name, split, revision (`str`, *optional*): for `load_dataset`, when `dataset` is an id or a path.

    Returns:
        `tuple[datasets.Dataset, DatasetProfile]`: the dataset with the seven columns of `hf_dflop.Shapes` added,
        and its profile.

    Raises:
        DatasetError: a row is not usable; names its index, the column and the cause.
        ProcessorError: the processor cannot count.
        ShapeMismatchError: a really processed row differs from its counts.

    Example:
        >>> ds, profile = profile_dataset(ds, "HuggingFaceTB/SmolVLM-256M-Instruct")    # doctest: +SKIP
        >>> print(profile.summary())                                                    # doctest: +SKIP
    """
    source = str(dataset) if isinstance(dataset, str | os.PathLike) else None
    data = _load_dataset(dataset, name, split, revision)
    processor, config = _load_processor(processor, config)
    raw = _raw(data)
    found = detect_layout(raw[0], raw.features, layout=layout, image_column=image_column)
    fingerprint = processor_fingerprint(processor, labels, max_length)
    record = {
        "processor": fingerprint,
        "processor_class": type(processor).__name__,
        "patch_size": getattr(getattr(config, "vision_config", None), "patch_size", None),
        "labels": labels,
        "max_length": max_length,
        "layout": found.kind,
        "layout_columns": None if found.function else list(found.columns or ()),
        "layout_function": _function_hash(found),
        "image_column": found.image_column,
    }
    record = json.loads(json.dumps(record))  # as it is read back from the dataset: tuples are lists
    if annotation_of(data) == record:
        shapes = Shapes.from_columns(data.with_format("numpy", columns=list(SHAPE_COLUMNS))[:])
        annotated = data
    else:
        shapes = _cached_counts(raw, processor, config, found, record, num_proc, verify, seed)
        annotated = _join(data, shapes, record)
    origin = {"dataset": source, "name": name, "split": str(data.split), "revision": revision, **record}
    return annotated, DatasetProfile.from_shapes(shapes, provenance=origin)


def _load_dataset(dataset: Any, name: str | None, split: str | None, revision: str | None) -> Any:
    import datasets

    if isinstance(dataset, str | os.PathLike):
        path = Path(dataset)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(str(path))
            if split is not None and isinstance(dataset, datasets.DatasetDict):
                dataset = _one_split(dataset, split)
        else:
            dataset = datasets.load_dataset(str(dataset), name, split=split, revision=revision)
    if isinstance(dataset, datasets.DatasetDict):
        dataset = _one_split(dataset, next(iter(dataset)) if len(dataset) == 1 else None)
    if not isinstance(dataset, datasets.Dataset):
        raise DatasetError(
            f"{type(dataset).__name__} cannot be annotated; pass a map-style datasets.Dataset "
            "(Dataset.from_generator makes one from an iterable)"
        )
    if not len(dataset):
        raise DatasetError("the dataset has no rows")
    return dataset


def _one_split(splits: Any, split: str | None) -> Any:
    if split not in splits:
        raise DatasetError(f"split {split!r} is not one of {list(splits)}; pass one of them")
    return splits[split]


def _load_processor(processor: Any, config: Any) -> tuple[Any, Any]:
    if not isinstance(processor, str | os.PathLike):
        return processor, config
    from transformers import AutoConfig, AutoProcessor

    if config is None:
        try:
            config = AutoConfig.from_pretrained(processor)
        except (OSError, ValueError) as error:
            logger.warning("no model config was found beside the processor %s: %s", processor, error)
    return AutoProcessor.from_pretrained(processor), config


def _raw(data: Any) -> Any:
    """The dataset without format and shape columns, its images undecoded; shares the table."""
    import datasets

    dropped = [column for column in data.column_names if column.startswith(COLUMN_PREFIX)]
    plain = data.with_format(None).remove_columns(dropped)
    info = copy.deepcopy(plain.info)
    info.features = datasets.Features({k: _undecoded(v) for k, v in plain.features.items()})
    return datasets.Dataset(
        plain.data, info=info, split=plain.split, indices_table=plain._indices, fingerprint=plain._fingerprint
    )


def _undecoded(feature: Any) -> Any:
    """The same feature with every image in it left as bytes or path."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        return {key: _undecoded(value) for key, value in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(value) for value in feature]
    if hasattr(feature, "feature"):
        feature = copy.copy(feature)
        feature.feature = _undecoded(feature.feature)
    return feature


def _cached_counts(
    raw: Any,
    processor: Any,
    config: Any,
    layout: Layout,
    record: dict[str, Any],
    num_proc: int | None,
    verify: int,
    seed: int,
) -> Shapes:
    import datasets
    import transformers

    parts = [raw._fingerprint, len(raw), transformers.__version__, record]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_dflop" / f"{key}.npz"
    if datasets.is_caching_enabled() and path.exists():
        with np.load(path, allow_pickle=False) as file:
            if int(file["verified"]) >= min(verify, len(raw)):
                logger.info("shape columns read from %s", path)
                return Shapes.from_columns({column: file[column] for column in SHAPE_COLUMNS})
    annotator = Annotator(TokenCounter(processor, config), layout, record["labels"], record["max_length"])
    _verify(raw, annotator, verify, seed)
    narrow = raw if layout.columns is None else raw.select_columns(list(layout.columns))
    counted = narrow.with_format("arrow").map(
        annotator,
        batched=True,
        batch_size=_BATCH_ROWS,
        with_indices=True,
        remove_columns=narrow.column_names,
        features=datasets.Features({column: datasets.Value("int64") for column in SHAPE_COLUMNS}),
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=key,
        desc="Counting tokens",
    )
    shapes = Shapes.from_columns(counted.with_format("numpy")[:])
    if datasets.is_caching_enabled():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{key}.{os.getpid()}.npz")
        arrays: dict[str, Any] = {"verified": np.int64(min(verify, len(raw))), **shapes.to_columns()}
        np.savez_compressed(unfinished, **arrays)
        unfinished.replace(path)
    return shapes


def _verify(raw: Any, annotator: Annotator, verify: int, seed: int) -> None:
    picked = np.random.default_rng(seed).permutation(len(raw))[:verify]
    for index in sorted(int(i) for i in picked):
        row = read_row(raw[index], annotator.layout, index=index)
        counted = annotator.count([row])[0]
        check_row(
            annotator.counter.processor, row, counted, annotator.counter, annotator.renderer, annotator.max_length
        )


def _join(data: Any, shapes: Shapes, record: dict[str, Any]) -> Any:
    """The dataset with the columns added, without copying its rows; the given dataset is left as it is."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, concat_tables

    dropped = [column for column in data.column_names if column.startswith(COLUMN_PREFIX)]
    plain = data.remove_columns(dropped)
    columns = shapes.to_columns()
    if plain._indices is not None:
        # Under a select or shuffle, row i lies at table row indices[i]; rows that are not selected stay 0, unseen.
        where = plain._indices.column("indices").to_numpy()
        scattered = {name: np.zeros(len(plain.data), np.int64) for name in columns}
        for name, values in columns.items():
            scattered[name][where] = values
        columns = scattered
    added = InMemoryTable(pa.table({name: pa.array(values) for name, values in columns.items()}))
    info = copy.deepcopy(plain.info)
    info.features = datasets.Features({**plain.features, **{name: datasets.Value("int64") for name in SHAPE_COLUMNS}})
    info.description = with_annotation(info.description, record)
    origin = json.dumps([plain._fingerprint, record], sort_keys=True).encode()
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
