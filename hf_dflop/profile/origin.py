"""Which processor and policy annotated a dataset, kept with the dataset itself.

The record is one line of JSON in `dataset.info.description`: it stays through select, shuffle, map and
save_to_disk, and shows in the dataset's own metadata. It says what the columns were counted with, so that a later
step can refuse a dataset that another processor annotated.
"""

import hashlib
import json
from typing import Any

from hf_dflop.errors import DatasetError
from hf_dflop.rows.labels import check_policy
from hf_dflop.rows.render import audio_extractor, audio_token
from hf_dflop.shapes import NEEDED_COLUMNS, SHAPE_COLUMNS

__all__ = ["annotation_of", "processor_fingerprint", "with_annotation"]

_MARK = "hf_dflop annotation: "
_SCHEME = 1
"""Raised when the meaning of a column changes, so that older caches are not used."""


def processor_fingerprint(processor: Any, labels: str = "assistant", max_length: int | None = None) -> str:
    """A hash of everything of a processor and policy that changes token counts.

    Covers the tokenizer, the settings of the image and video processors and of the processor, the chat template,
    `labels` and `max_length`. The same in every process.

    Args:
        processor (`ProcessorMixin`): the processor.
        labels (`str`, defaults to `"assistant"`): label policy.
        max_length (`int`, *optional*): length at which samples are cut.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    check_policy(labels)
    tokenizer = processor.tokenizer
    images: Any = getattr(processor, "image_processor", None)
    videos = getattr(processor, "video_processor", None)
    sounds: Any = audio_extractor(processor) if audio_token(processor) is not None else None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The text before "added_tokens" holds the padding and truncation of the last call, which is no property.
    vocabulary = "" if backend is None else backend.to_str().partition('"added_tokens"')[2]
    known = {
        "scheme": _SCHEME,
        "processor": type(processor).__name__,
        "settings": _plain(vars(processor), skip=("tokenizer", "image_processor", "video_processor")),
        "image_processor": type(images).__name__.removesuffix("Pil").removesuffix("Fast"),
        "images": None
        if images is None
        else _plain(images.to_dict(), skip=("image_processor_type", "processor_class")),
        "videos": None if videos is None or not hasattr(videos, "to_dict") else _plain(videos.to_dict()),
        # Padding is never counted, and trainers set a pad token where there is none.
        "special_tokens": _plain(dict(tokenizer.special_tokens_map), skip=("pad_token",)),
        "truncation_side": getattr(tokenizer, "truncation_side", "right"),
        "tokenizer_template": getattr(tokenizer, "chat_template", None),
        "labels": labels,
        "max_length": max_length,
    }
    if sounds is not None and hasattr(sounds, "to_dict"):
        known["sounds"] = _plain(sounds.to_dict(), skip=("feature_extractor_type", "processor_class"))
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    digest.update(vocabulary.encode())
    return digest.hexdigest()[:16]


def annotation_of(dataset: Any) -> dict[str, Any] | None:
    """What a dataset was annotated with: `processor`, `labels`, `max_length`, `layout` and so on.

    Args:
        dataset (`datasets.Dataset`): any dataset.

    Returns:
        `dict` or `None`: the record; `None` when the dataset is not annotated or lost a shape column.

    Raises:
        DatasetError: rows that were annotated by different processors were concatenated.

    Example:
        >>> record = annotation_of(dataset)                                             # doctest: +SKIP
        >>> record["processor"] == processor_fingerprint(processor)                     # doctest: +SKIP
        True
    """
    if any(column not in dataset.column_names for column in NEEDED_COLUMNS):
        return None
    lines = (dataset.info.description or "").splitlines()
    records = {line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)}
    if len(records) > 1:
        raise DatasetError(
            f"the dataset joins rows of {len(records)} different annotations; concatenate first, then profile"
        )
    record = json.loads(records.pop()) if records else None
    if record and "audio_column" in record and any(column not in dataset.column_names for column in SHAPE_COLUMNS):
        return None  # a record without that key is of the time before sounds were counted
    return record


def with_annotation(description: str | None, record: dict[str, Any]) -> str:
    """A dataset description with `record` in place of any earlier one."""
    lines = [line for line in (description or "").splitlines() if not line.startswith(_MARK)]
    return "\n".join([*lines, _MARK + json.dumps(record, sort_keys=True)])


def _plain(settings: dict[str, Any], skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings that are plain data, without private ones."""
    kept = (bool, int, float, str, list, tuple, dict, type(None))
    return {k: v for k, v in settings.items() if k not in skip and not k.startswith("_") and isinstance(v, kept)}
