"""What differs between versions of transformers in how features enter a model, in one place.

In: the inputs of a model's forward, features among them as `mm_encoder_outputs`. Out: what the forward returns.

From transformers 5.18 on the forward takes `mm_encoder_outputs` itself. Before, it calls its own `get_image_features`
where it is given pixels: then it is given a number instead of pixels, and for the time of the forward that method of
this one module returns the features. It must be asked exactly once, so a forward that goes another way is refused.
"""

import inspect
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError

__all__ = ["call_with_features", "encoder_inputs", "takes_features", "takes_outputs"]

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def takes_features(body: nn.Module) -> bool:
    """Whether features from another rank can enter the forward of `body`."""
    return takes_outputs(body) or _PIXELS["image"] in _forward_inputs(body)


def call_with_features(model: nn.Module, body: nn.Module, **given: Any) -> Any:
    """`model(**given)`, where `given` may hold `mm_encoder_outputs` whatever the version.

    Args:
        model (`nn.Module`): `body` or what holds it.
        body (`nn.Module`): whose `get_image_features` the forward calls; not shared with another stage.
        given (`Any`): inputs of the forward; `mm_encoder_outputs`, *optional*: modality -> output of the encoder.

    Raises:
        ModelError: the forward asks for the features of a modality never, or several times.
    """
    if "mm_encoder_outputs" not in given or takes_outputs(body):
        return model(**given)
    asked: list[str] = []

    def stand_in(kind: str, output: Any) -> Any:
        def features(*args: Any, **kwargs: Any) -> Any:
            asked.append(kind)
            return output

        return features

    outputs = given.pop("mm_encoder_outputs")
    methods = {f"get_{kind}_features": stand_in(kind, output) for kind, output in outputs.items()}
    pixels = {_PIXELS[kind]: torch.zeros(1, device=given["input_ids"].device) for kind in outputs}
    vars(body).update(methods)
    try:
        result = model(**given, **pixels)
    finally:
        for name in methods:
            del vars(body)[name]
    if sorted(asked) != sorted(outputs):
        raise ModelError(
            f"{type(body).__name__} does not take its features from one call of get_image_features in this version of "
            "transformers: they cannot enter from another rank. Upgrade to 5.18 at least, or use a plan without a "
            "pipeline."
        )
    return result


def encoder_inputs(body: Any) -> tuple[str, ...]:
    """Inputs of `get_image_features`: before 5.18 LLaVA hands it the sizes of images beside those it names."""
    method = inspect.signature(body.get_image_features).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in method.values() if p.kind in kinds and not p.name.startswith("vision_feature")]
    if not takes_outputs(body) and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in method.values()):
        names += [name for name in ("image_sizes",) if name in _forward_inputs(body) and name not in names]
    return tuple(names)


def takes_outputs(body: nn.Module) -> bool:
    """Whether the forward of `body` takes `mm_encoder_outputs`."""
    return "mm_encoder_outputs" in _forward_inputs(body)


def _forward_inputs(body: nn.Module) -> Any:
    return inspect.signature(type(body).forward).parameters
