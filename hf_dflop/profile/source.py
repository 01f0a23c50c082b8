"""From what the user names to what is annotated: datasets, streams and processors.

Inputs: a dataset object, a Hub id, or a local folder or file. Outputs: `datasets` objects, and the same without
decoding. A local file goes to the reader of `load_dataset` that its ending asks for.
"""

import copy
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.shapes import COLUMN_PREFIX

__all__ = ["load_processor", "open_dataset", "undecoded", "without_decoding"]

logger = logging.getLogger(__name__)

_READERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".txt": "text",
}


def open_dataset(dataset: Any, name: str | None, split: str | None, revision: str | None, streaming: bool) -> Any:
    """The dataset or stream that is meant; a dict of them when there are several splits and none was picked.

    Raises:
        DatasetError: it cannot be found or read, or there is no such split.
    """
    import datasets

    opened = dataset
    if isinstance(dataset, str | os.PathLike):
        opened = _load(str(dataset), name, split, revision, streaming)
        if isinstance(opened, dict) and split is None and len(opened) == 1:
            (opened,) = opened.values()
    if isinstance(opened, dict) and split is not None:
        if split not in opened:
            raise DatasetError(f"split {split!r} is not one of {list(opened)}; pass one of them")
        opened = opened[split]
    if isinstance(opened, dict) and not opened:
        raise DatasetError("the dataset has no splits")
    if not isinstance(opened, datasets.Dataset | datasets.IterableDataset | dict):
        raise DatasetError(
            f"{type(opened).__name__} cannot be annotated; pass a datasets.Dataset, a DatasetDict, an "
            "IterableDataset, the id of one on the Hub, or a local path (Dataset.from_generator makes one from an "
            "iterable)"
        )
    return opened


def _load(dataset: str, name: str | None, split: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets

    path = Path(dataset)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(dataset)
        if not streaming:
            return saved
        if isinstance(saved, dict):
            return datasets.IterableDatasetDict({key: part.to_iterable_dataset() for key, part in saved.items()})
        return saved.to_iterable_dataset()
    options: dict[str, Any] = {"name": name, "split": split, "revision": revision, "streaming": streaming}
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DatasetError(f"{dataset}: files ending in {path.suffix!r} are not read; expected {list(_READERS)}")
        options |= {"data_files": str(path), "revision": None}
        dataset = reader
    try:
        try:
            loaded = datasets.load_dataset(dataset, **options)
        except Exception as error:
            if not _asks_for_torchcodec(error):
                raise
            loaded = None
        if (streaming or loaded is None) and find_spec("torchcodec") is None:
            stream = datasets.load_dataset(dataset, **{**options, "streaming": True}) if loaded is None else loaded
            if features := _sounds_as_bytes(stream):
                return datasets.load_dataset(dataset, **options, features=features)
            if loaded is None:
                raise ImportError("its sounds are read by torchcodec: pip install torchcodec")
        return loaded
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        said = f"{cause}".strip().splitlines()
        raise DatasetError(
            f"the dataset {str(path)!r} cannot be loaded: {type(cause).__name__}: {said[0] if said else ''}"
        ) from error


def _asks_for_torchcodec(error: BaseException | None) -> bool:
    """Whether an error comes from the library by which `datasets` writes sounds."""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__
    return error is not None and "torchcodec" in str(error)


def _sounds_as_bytes(stream: Any) -> Any:
    """Features of an archive whose members are rows (WebDataset), sounds being bytes; `None` for anything else.

    `datasets` would ask for torchcodec even where nothing is decoded.
    """
    import datasets

    first = next(iter(stream.values())) if isinstance(stream, dict) else stream
    features = first.features or {}
    sounds = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if not sounds or "__key__" not in features:
        return None
    return datasets.Features({**features, **{name: datasets.Value("binary") for name in sounds}})


def load_processor(processor: Any, config: Any) -> tuple[Any, Any]:
    """The processor, and the model's config where it lies beside the processor.

    Raises:
        ProcessorError: nothing of that id or path can be loaded.
    """
    if not isinstance(processor, str | os.PathLike):
        return processor, config
    from transformers import AutoConfig, AutoProcessor

    if config is None:
        try:
            config = AutoConfig.from_pretrained(processor)
        except (OSError, ValueError) as error:
            logger.warning("no model config was found beside the processor %s: %s", processor, error)
    try:
        return AutoProcessor.from_pretrained(processor), config
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise ProcessorError(f"the processor {str(processor)!r} cannot be loaded: {said}") from error


def without_decoding(data: Any) -> Any:
    """The dataset without format and shape columns, its images undecoded; shares the table."""
    import datasets

    dropped = [column for column in data.column_names if column.startswith(COLUMN_PREFIX)]
    plain = data.with_format(None).remove_columns(dropped)
    info = copy.deepcopy(plain.info)
    info.features = datasets.Features({k: undecoded(v) for k, v in plain.features.items()})
    return datasets.Dataset(
        plain.data, info=info, split=plain.split, indices_table=plain._indices, fingerprint=plain._fingerprint
    )


def undecoded(feature: Any) -> Any:
    """The same feature with every image, video and sound in it left as bytes or path."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if type(feature).__name__ in ("Audio", "Video"):
        feature = copy.copy(feature)
        feature.decode = False
        return feature
    if isinstance(feature, dict):
        return {key: undecoded(value) for key, value in feature.items()}
    if isinstance(feature, list):
        return [undecoded(value) for value in feature]
    if hasattr(feature, "feature"):
        feature = copy.copy(feature)
        feature.feature = undecoded(feature.feature)
    return feature
