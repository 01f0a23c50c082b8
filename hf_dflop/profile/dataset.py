"""`profile_dataset`: a dataset in, the dataset with its shape columns and a `DatasetProfile` out.

Order of work: a few random rows are counted and really processed first, and a mismatch stops here; then all rows
are counted from headers and text (`counts.py`). Images are not decoded and the rows are not copied: the columns are
counted into a small table and joined to the dataset's own table, whatever select or shuffle lies on top of it
(`join.py`). Streams are annotated as they are read (`stream.py`).

Assumptions: rows are what the stored columns hold; a transform set with `with_transform` is put back on the
returned dataset, and is not applied while counting.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_dflop.errors import DatasetError
from hf_dflop.profile.annotate import ERROR_COLUMN
from hf_dflop.profile.bad_rows import check_on_error, raise_first, reasons_of, row_errors
from hf_dflop.profile.counts import cached_counts, find_layout
from hf_dflop.profile.join import join_columns
from hf_dflop.profile.origin import annotation_of
from hf_dflop.profile.policy import Policy, marked, record_of, spec_of
from hf_dflop.profile.report import DatasetProfile
from hf_dflop.profile.source import load_processor, open_dataset, without_decoding
from hf_dflop.profile.stream import SAMPLINGS, profile_stream
from hf_dflop.profile.subset import find_subsets
from hf_dflop.shapes import Shapes

__all__ = ["profile_dataset"]


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
    """Count patches, image tokens, text tokens and label tokens of every sample, without decoding images or videos.

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
        `tuple`: the dataset with the columns of `hf_dflop.Shapes` added, and its `DatasetProfile`. A
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
    policy = Policy(
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


def _profile_split(data: Any, policy: Policy, split: str | None) -> tuple[Any, DatasetProfile]:
    import datasets

    source = {**policy.source, "split": split or policy.source["split"] or str(data.split)}
    try:
        if isinstance(data, datasets.IterableDataset):
            return profile_stream(data, policy, source)
        return _profile_rows(data, policy, source)
    except DatasetError as error:
        if split is None:
            raise
        raise type(error)(f"split {split!r}: {error}") from error


def _profile_rows(data: Any, policy: Policy, source: dict[str, Any]) -> tuple[Any, DatasetProfile]:
    from datasets.table import InMemoryTable

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
    found = find_layout(raw, policy)
    record = record_of(policy, found)
    counts: Any
    if annotation_of(data) == record:
        shapes = Shapes.of_dataset(data)
        has_reasons = ERROR_COLUMN in data.column_names
        reasons = reasons_of(data.with_format(None)[ERROR_COLUMN][:]) if has_reasons else {}
        kept = has_reasons == (policy.on_error == "mark")
        counts = None if kept else InMemoryTable.from_pydict(shapes.to_columns())
    else:
        counts, shapes, reasons = cached_counts(raw, policy, found, record)
    raise_first(reasons, len(data), policy.on_error)
    annotated = data
    if counts is not None:
        annotated = join_columns(data, counts, record, reasons if policy.on_error == "mark" else None)
    names, subset = find_subsets(raw)
    if reasons and policy.on_error == "skip":
        usable = np.setdiff1d(np.arange(len(data)), np.fromiter(reasons, dtype=np.int64, count=len(reasons)))
        annotated, shapes = annotated.select(usable), shapes.select(usable)
        subset = None if subset is None else subset[usable]
    profile = DatasetProfile.from_shapes(
        shapes,
        provenance={**source, **record},
        errors=row_errors(reasons, picked),
        unusable=marked(policy, reasons),
        spec=spec_of(policy.config, shapes),
        subset_names=names,
        subset=subset,
    )
    return annotated, profile
