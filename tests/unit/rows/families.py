"""Every image-text processor of the installed transformers, built offline, by structure and not by name.

Which processors there are, and which image processor goes with each, is what the auto classes of transformers say.
Special tokens are what a processor's own module names. Image processors are those that need no torchvision; the
config is the family's default. What cannot be built is told with the reason.
"""

import contextlib
import functools
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import import_utils

from tests.distributed.every_case import EVERY_CASE
from tests.unit.rows import tiny
from tests.unit.rows.pixel_ops import standing_in

ROOT = Path(transformers.__file__).parent / "models"
TOKEN = re.compile(r"[\"'](<[^<>\"'\s]{1,40}>|\[[A-Z_]{2,20}\])[\"']")
OWN = {
    "pixtral": tiny.pixtral,
    "mistral3": tiny.mistral3,
    "mistral_large4": tiny.mistral3,
    "paligemma": tiny.paligemma,
}
"""Processors that ask for torchvision without needing it, or for settings that no default gives, built in `tiny`."""


class NotBuilt(Exception):
    """Why a processor cannot be built here."""


def families() -> Iterator[str]:
    """Model types whose processor writes something in place of an image."""
    for family in list(PROCESSOR_MAPPING_NAMES):
        source = _source(processor_class(family))
        if source is not None and "image_processor" in source[1] and "def replace_image_token" in source[1]:
            yield family


def processor_class(family: str) -> str:
    name = PROCESSOR_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


def build(family: str) -> tuple[Any, Any]:
    """The processor and the default config.

    Raises:
        NotBuilt: it cannot be built without torchvision, or without more than the special tokens.
    """
    config = _config(family)
    if family in OWN:
        return OWN[family](), tiny.config_of(OWN[family])
    images, videos = _image_processor(family), video_processor(family)
    found = _source(processor_class(family))
    assert found is not None
    available = {**import_utils.BACKENDS_MAPPING, "torchvision": (lambda: True, "")}
    try:
        with mock.patch.object(import_utils, "BACKENDS_MAPPING", available):
            cls = getattr(importlib.import_module(found[0]), processor_class(family))
        processor = _assemble(cls, images, videos or _Stand(images), config, found[1], {})
        said = {name: value for name, value in vars(processor).items() if "token" in name and isinstance(value, str)}
        processor = _assemble(cls, images, videos or _Stand(images), config, found[1], said)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error
    return processor, config


def templates(processor: Any) -> list[str]:
    """Chat templates that write the image token alone, and between the marks that some processors ask for."""
    token = getattr(processor, "image_token", None) or ""
    marks = [getattr(processor, f"image_{side}_token", None) for side in ("start", "end")]
    around = [token, f"{marks[0]}{token}{marks[1]}"] if all(isinstance(mark, str) for mark in marks) else [token]
    return [tiny.CHATML.replace("IMAGE", image) for image in around]


def _assemble(
    cls: Any, images: Any, videos: Any, config: Any, source: str, said: dict[str, str], sounds: Any = None
) -> Any:
    named = sorted(
        name
        for name in set(re.findall(r"tokenizer(?:\.|, [\"'])(\w+_token)(?:_id)?\b", source))
        if not name.startswith("add_") and name not in ("pad_token", "bos_token", "eos_token", "unk_token")
    )
    attributes = {name: said.get(name, f"<{name}>") for name in named}
    backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    tokens = {*TOKEN.findall(source), *attributes.values(), *said.values()}
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(tokens) if t])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=attributes,
    )  # fmt: skip
    patch_size = getattr(getattr(config, "vision_config", None), "patch_size", None) or 14
    guesses = {"patch_size": patch_size, "vision_feature_select_strategy": "full"}
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name == "image_processor":
            given[name] = images
        elif name == "tokenizer":
            given[name] = tokenizer
        elif name == "video_processor":
            given[name] = videos
        elif name in ("feature_extractor", "audio_processor") and (sounds is not None or not _optional(parameter)):
            given[name] = _Stand(images) if sounds is None else sounds
        elif parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        elif name in guesses and parameter.default in (None, inspect.Parameter.empty):
            given[name] = guesses[name]
        elif parameter.default is inspect.Parameter.empty or (
            parameter.default is None and name.startswith(("image_seq", "num_image"))
        ):
            given[name] = 16
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", return_value=None):
        return cls(**given)


class _Stand:
    """Stands for a video or audio processor: the image processor's settings, and some that only they have."""

    num_frames, fps, temporal_patch_size, merge_size, sampling_rate, hop_length = 4, 1, 2, 2, 16_000, 160

    def __init__(self, images: Any) -> None:
        self._images = images

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_images"), name)


def _optional(parameter: inspect.Parameter) -> bool:
    return parameter.default is None


def _config(family: str) -> Any:
    try:
        return CONFIG_MAPPING[family]()
    except Exception:
        return None


def _image_processor(family: str) -> Any:
    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(family)
    if not isinstance(entry, dict):
        raise NotBuilt("no image processor of its own")
    if "pil" not in entry:
        raise NotBuilt("its image processor needs torchvision")
    for path in _files("image_processing"):
        if re.search(rf"^class {entry['pil']}\(", path.read_text(encoding="utf-8"), re.M):
            try:
                return _small(getattr(importlib.import_module(_module(path)), entry["pil"])(), 1 if EVERY_CASE else 4)
            except Exception as error:
                raise NotBuilt(f"{type(error).__name__}: {error}") from error
    raise NotBuilt(f"{entry['pil']} is not there")


def video_processor(family: str) -> Any:
    """The family's video processor with its own settings; `None` where it has none that can be built."""
    # Without torchvision, transformers forgets the names.
    auto = (ROOT / "auto" / "video_processing_auto.py").read_text(encoding="utf-8")
    borrowed = dict(re.findall(r'\("(\w+)", (?:\{"torchvision": )?"(\w+)"', auto)).get(family)
    for path in _files("video_processing"):
        classes = re.findall(r"^class (\w+VideoProcessor)\(", path.read_text(encoding="utf-8"), re.M)
        name = borrowed if borrowed in classes else classes[-1] if classes and path.parent.name == family else None
        if name is not None:
            with standing_in():
                return _small(getattr(importlib.import_module(_module(path)), name)(), 4)
    return None


def _small(processor: Any, part: int) -> Any:
    """The same rule with sides of images or frames divided: strips of 1:600 cost seconds at their own size.

    Sizes that name two edges are numbers of pixels.
    """
    tile, size = getattr(processor, "max_image_size", None), getattr(processor, "size", None)
    if size and not isinstance(tile, int | None) and dict(tile).get("longest_edge", 10_000) < 10_000:
        # Rows and columns of tiles, of 64 pixels.
        processor.size = type(size)(longest_edge=64 * dict(size)["longest_edge"] // dict(tile)["longest_edge"])
        processor.max_image_size = type(tile)(longest_edge=64)
        return processor
    for name in ("size", "crop_size", "max_image_size"):
        given = getattr(processor, name, None)
        if isinstance(given, int):
            setattr(processor, name, given // part)
            continue
        size = {edge: pixels for edge, pixels in dict(given or {}).items() if pixels is not None}
        is_area = {"shortest_edge", "longest_edge"} <= set(size) or size.get("longest_edge", 0) > 10_000
        by = part**2 if is_area else part
        if size:
            setattr(processor, name, type(given)(**{edge: pixels // by for edge, pixels in size.items()}))
    if getattr(processor, "image_grid_pinpoints", None):
        processor.image_grid_pinpoints = [[edge // part for edge in grid] for grid in processor.image_grid_pinpoints]
    return processor


@functools.cache
def _files(kind: str) -> tuple[Path, ...]:
    return tuple(sorted(ROOT.glob(f"*/{kind}_*.py")))


@functools.cache
def _source(name: str) -> tuple[str, str] | None:
    """Module and source text of a processor class."""
    for path in _files("processing"):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^class {name}\(", text, re.M):
            return _module(path), text
    return None


def _module(path: Path) -> str:
    return f"transformers.models.{path.parent.name}.{path.stem}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of processors that are built and run by the hundred."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
