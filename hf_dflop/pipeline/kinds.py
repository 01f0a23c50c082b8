"""Which rows of features are an image's and which are a video's, and the order in which they stand in one tensor.

In: the inputs of a microbatch, the body of the model. Out: rows in the order of their placeholders in `input_ids`,
over images and videos alike, and back from such rows to what the model's own code takes.

Assumption: `get_placeholder_mask` of the model tells the placeholders of both from `input_ids` alone. Where images and
videos have one token, `mm_token_type_ids` tells them apart; without it, an LLM's microbatch holds one kind.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from hf_dflop.errors import ModelError, ShapeMismatchError
from hf_dflop.pipeline._compat import takes_outputs
from hf_dflop.pipeline.features import FeatureFormat, flatten, unflatten

__all__ = [
    "KINDS",
    "Formats",
    "enter",
    "has_videos",
    "is_pixels",
    "join",
    "kinds_of",
    "placeholder_kinds",
    "refuse_sounds",
    "run_encoder",
    "sent_width",
    "takes_videos",
]

KINDS = ("image", "video")
_VIDEO_TYPE = 2  # in transformers' `mm_token_type_ids`

Formats = Mapping[str, FeatureFormat]
"""Kind -> the format of its features, of the kinds that have come so far; rows of both have the same width."""


def takes_videos(body: Any) -> bool:
    """Whether videos can be run: the model has a method for their features, tells their placeholders, and takes the
    features themselves (transformers >= 5.18; before, inputs of the method and of the forward have other names)."""
    return takes_outputs(body) and hasattr(body, "get_video_features") and hasattr(body, "get_placeholder_mask")


def is_pixels(key: str) -> bool:
    """Whether an input is as large as the images, so that LLM ranks never hold it."""
    return key.startswith("pixel_")


def kinds_of(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Kinds whose pixels are among the encoder's inputs."""
    found = {"video" if "video" in key else "image" for key, value in inputs.items() if is_pixels(key) and _is(value)}
    return tuple(kind for kind in KINDS if kind in found)


def has_videos(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs of the encoder or of the LLM tell of videos."""
    return any("video" in key and _is(value) for key, value in inputs.items())


def run_encoder(body: Any, kind: str, inputs: Mapping[str, Any], keys: Mapping[str, Collection[str]]) -> Any:
    """What the model's own method for features of a kind returns; `keys`: the method's inputs, by kind."""
    known = {key: value for key, value in inputs.items() if key in keys[kind]}
    method = body.get_video_features if kind == "video" else body.get_image_features
    return method(**known, return_dict=True)


def refuse_sounds(given: Iterable[Mapping[str, Any] | None], name: str) -> None:
    """Raise `ModelError` if there are features of sounds among the inputs."""
    for inputs in given:
        for key, value in (inputs or {}).items():
            if _is(value) and (key.startswith("input_features") or "audio" in key):
                raise ModelError(
                    f"a microbatch holds sounds ({key}), and a pipeline runs images and videos alone: drop the "
                    f"sounds, or train {name} with Trainer and DflopCallback."
                )


def _is(value: Any) -> bool:
    return value is not None


def sent_width(forms: Formats) -> int:
    return next((form.sent_width for form in forms.values()), 0)


def _of_videos(body: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """For each row of features whether it is a video's, `(rows,)`."""
    ids = inputs["input_ids"]
    stand_in = torch.zeros((*ids.shape, 1), device=ids.device)  # of the embeddings, which are not looked at
    images, videos = (mask[..., 0] for mask in body.get_placeholder_mask(ids, inputs_embeds=stand_in))
    if torch.equal(images, videos):
        types = inputs.get("mm_token_type_ids")
        if types is not None:
            return types[images] == _VIDEO_TYPE
        return torch.full((int(images.sum()),), has_videos(inputs), device=ids.device)
    return videos[images | videos]


def placeholder_kinds(body: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Kinds whose placeholders are among an LLM's inputs, of a model that takes videos."""
    videos = _of_videos(body, inputs)
    found = {"image": bool((~videos).any()), "video": bool(videos.any())}
    return tuple(kind for kind in KINDS if found[kind])


def join(outputs: Mapping[str, Any], forms: Formats, body: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Features of each kind as the encoder returns them -> `(rows, sent_width)`.

    Raises:
        ShapeMismatchError: there are images and videos, and `input_ids` has other numbers of placeholders, or is not
            given.
    """
    parts = {kind: flatten(output, forms[kind]) for kind, output in outputs.items()}
    if len(parts) == 1:
        return next(iter(parts.values()))
    if inputs.get("input_ids") is None:
        raise ShapeMismatchError("images and videos in one microbatch of the encoder need its input_ids, too")
    videos = _of_videos(body, inputs)
    sizes = len(parts["image"]), len(parts["video"])
    if (int((~videos).sum()), int(videos.sum())) != sizes:
        raise ShapeMismatchError(
            f"the encoder gives {sizes[0]} rows of image and {sizes[1]} of video features, and input_ids has "
            f"{int((~videos).sum())} and {int(videos.sum())} placeholders"
        )
    order = torch.empty(len(videos), dtype=torch.long, device=videos.device)
    order[~videos] = torch.arange(sizes[0], device=videos.device)
    order[videos] = sizes[0] + torch.arange(sizes[1], device=videos.device)
    return torch.cat([parts["image"], parts["video"]])[order]


def enter(rows: torch.Tensor, forms: Formats, body: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Such rows -> `mm_encoder_outputs` of the model, which holds the kinds that the microbatch has.

    Raises:
        ShapeMismatchError: `input_ids` has another number of placeholders.
    """
    if "video" not in forms:
        return {"image": unflatten(rows, forms["image"])}
    videos = _of_videos(body, inputs)
    if len(videos) != len(rows):
        raise ShapeMismatchError(
            f"input_ids has {len(videos)} placeholders of images and videos, but {len(rows)} rows of features came"
        )
    parts = {"image": rows[~videos], "video": rows[videos]}
    return {kind: unflatten(part, forms[kind]) for kind, part in parts.items() if len(part)}
