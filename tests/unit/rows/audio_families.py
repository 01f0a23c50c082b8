"""Every processor that writes something in place of a sound, built offline, by structure.

As `families` does for images; the feature extractor is the one that transformers' auto class names for the model type.
"""

import importlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import import_utils

from tests.unit.rows import families, tiny
from tests.unit.rows.families import NotBuilt

OWN = {"qwen2_audio": tiny.qwen2_audio, "qwen2_5_omni": tiny.qwen2_5_omni}
_BORROWED = "WhisperFeatureExtractor"
"""Most processors whose model type has no extractor of its own are fed with Whisper's."""


def audio_families() -> Iterator[str]:
    """Model types whose processor writes something in place of a sound."""
    for family in list(PROCESSOR_MAPPING_NAMES):
        source = families._source(families.processor_class(family))
        if source is not None and "def replace_audio_token" in source[1]:
            yield family


def build_audio(family: str) -> tuple[Any, Any]:
    """The processor and the default config.

    Raises:
        NotBuilt: it cannot be built without torchvision, or without more than the special tokens.
    """
    config = families._config(family)
    config = getattr(config, "thinker_config", config)
    if family in OWN:
        return _with_template(OWN[family]()), config
    name = families.processor_class(family)
    found = families._source(name)
    assert found is not None
    images = families._image_processor(family) if "image_processor" in found[1] else None
    videos = families.video_processor(family) if images is not None else None
    available = {**import_utils.BACKENDS_MAPPING, "torchvision": (lambda: True, "")}
    try:
        with mock.patch.object(import_utils, "BACKENDS_MAPPING", available):
            cls = getattr(importlib.import_module(found[0]), name)
        stand = videos or families._Stand(images)
        heard = _extractor(family)
        given = (cls, images, stand, config, found[1])
        processor = families._assemble(*given, {}, heard)
        said = {key: value for key, value in vars(processor).items() if "token" in key and isinstance(value, str)}
        return _with_template(families._assemble(*given, said, heard)), config
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error


def _extractor(family: str) -> Any:
    name = FEATURE_EXTRACTOR_MAPPING_NAMES.get(family) or _BORROWED
    for path in families._files("feature_extraction"):
        if re.search(rf"^class {name}\(", path.read_text(encoding="utf-8"), re.M):
            return getattr(importlib.import_module(families._module(path)), name)()
    raise NotBuilt(f"{name} is not there")


def _with_template(processor: Any) -> Any:
    token = getattr(processor, "audio_token", None)
    if not isinstance(token, str):
        raise NotBuilt("it has no audio token")
    template = tiny.AUDIO_CHATML.replace("SOUND", token)
    processor.chat_template = template.replace("IMAGE", getattr(processor, "image_token", None) or "")
    return processor
