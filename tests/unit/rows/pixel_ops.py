"""What transformers' video processors call of torchvision, in a few lines of torch: shapes as there, pixels nearly so.

Sampling, sizes, patches and text are transformers' own code. Only while `standing_in` holds does transformers believe
that torchvision is there; what it imported meanwhile goes on working.
"""

import contextlib
import enum
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import torch
import transformers
from torch.nn import functional
from transformers import image_processing_backends, video_processing_utils
from transformers.utils import import_utils

__all__ = ["standing_in"]


class InterpolationMode(enum.Enum):
    NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC = "nearest", "nearest-exact", "bilinear", "bicubic"
    BOX, HAMMING, LANCZOS = "box", "hamming", "lanczos"


def resize(image: torch.Tensor, size: Any, interpolation: Any = None, antialias: bool = True) -> torch.Tensor:
    *batch, channels, height, width = image.shape
    flat = image.reshape(-1, channels, height, width).to(torch.float32)
    flat = functional.interpolate(flat, size=list(size), mode="bilinear", antialias=antialias)
    if not image.dtype.is_floating_point:
        flat = flat.round().clamp(0, 255)
    return flat.to(image.dtype).reshape(*batch, channels, *size)


def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    mean, std = (torch.as_tensor(values, device=image.device).view(-1, 1, 1) for values in (mean, std))
    return (image - mean) / std


def pad(image: torch.Tensor, padding: Any, fill: Any = 0, padding_mode: str = "constant") -> torch.Tensor:
    left, top, right, bottom = padding
    return functional.pad(image, (left, right, top, bottom), value=fill or 0)


def crop(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    return image[..., top : top + height, left : left + width]


def grayscale_to_rgb(image: torch.Tensor) -> torch.Tensor:
    return image if image.shape[-3] >= 3 else image.expand(*image.shape[:-3], 3, *image.shape[-2:])


def to_pil_image(image: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(image.permute(1, 2, 0).numpy())


def pil_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(contents)
    return module


def _modules() -> dict[str, ModuleType]:
    ops = (resize, normalize, pad, crop, grayscale_to_rgb, to_pil_image, pil_to_tensor)
    contents = {**{op.__name__: op for op in ops}, "InterpolationMode": InterpolationMode}
    functions = _module("torchvision.transforms.v2.functional", **contents)
    second = _module("torchvision.transforms.v2", functional=functions)
    transforms = _module(
        "torchvision.transforms", v2=second, functional=functions, InterpolationMode=InterpolationMode
    )
    top = _module("torchvision", transforms=transforms, __version__="0.26.0")
    modules = (top, transforms, second, functions)
    return {module.__name__: module for module in modules} | {"torchvision.transforms.functional": functions}


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Video processors can be imported meanwhile, and called also later."""
    modules = _modules()
    available = {**import_utils.BACKENDS_MAPPING, "torchvision": (_yes, "")}
    modes = {PIL.Image.Resampling[mode.name]: mode for mode in InterpolationMode if mode.name != "NEAREST_EXACT"}
    # What these modules leave undefined where they find no torchvision.
    functions = modules["torchvision.transforms.v2.functional"]
    for module in (image_processing_backends, video_processing_utils):
        module.tvF = functions
    image_processing_backends.pil_torch_interpolation_mapping = modes
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(import_utils, "BACKENDS_MAPPING", available),
        mock.patch.object(import_utils, "is_torchvision_available", _yes),
        mock.patch.object(transformers.utils, "is_torchvision_available", _yes),
    ):
        yield


def _yes(*_: Any) -> bool:
    return True
