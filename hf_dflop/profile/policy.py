"""What `profile_dataset` was told, and the record of it that stays with the annotated dataset."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_dflop.cost import ModelSpec
from hf_dflop.errors import ModelError
from hf_dflop.profile.origin import processor_fingerprint
from hf_dflop.rows import Layout
from hf_dflop.shapes import Shapes

__all__ = ["Policy", "marked", "record_of", "spec_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
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


def spec_of(config: Any, shapes: Shapes) -> ModelSpec | None:
    """The model's structure, where its config is known and understood; with sounds, that of their encoder too."""
    if config is None:
        return None
    try:
        spec = ModelSpec.from_config(config)
        if shapes.num_audios.any() and spec.audio is None:
            raise ModelError("there are sounds, and the config describes no audio encoder that is covered")
        return spec
    except (ModelError, AttributeError, TypeError) as error:
        logger.warning("costs cannot be computed from this config: %s", error)
        return None


def marked(policy: Policy, reasons: Mapping[int, str]) -> list[int]:
    """Rows of the returned dataset whose counts of 0 mean nothing."""
    return sorted(reasons) if policy.on_error == "mark" else []


def record_of(policy: Policy, layout: Layout) -> dict[str, Any]:
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
        "audio_column": layout.audio_column,
    }
    return dict(json.loads(json.dumps(record)))  # as it is read back from the dataset: tuples are lists


def _function_hash(layout: Layout) -> str | None:
    from datasets.fingerprint import Hasher

    return None if layout.function is None else str(Hasher.hash(layout.function))
