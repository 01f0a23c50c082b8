"""Which rows of features are an image's and which are a video's, and the order in which they stand in one tensor.

In: the inputs of a microbatch, the body of the model. Out: rows in the order of their placeholders in `input_ids`,
over images and videos alike, and back from such rows to what the model's own code takes.

Assumption: `get_placeholder_mask` of the model tells the placeholders of both from `input_ids` alone. Where images and
videos have one token, a microbatch holds one of them, as the models themselves ask for.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_dflop.errors import ShapeMismatchError
from hf_dflop.pipeline.features import FeatureFormat, flatten, unflatten
from hf_dflop.pipeline.structure import is_pixels

__all__ = ["KINDS", "Formats", "enter", "has_videos", "join", "kinds_of", "sent_width", "takes_videos"]

KINDS = ("image", "video")

Formats = Mapping[str, FeatureFormat]
"""Kind -> the format of its features, of the kinds that have come so far; rows of both have the same width."""


def takes_videos(body: Any) -> bool:
    """Whether videos can be run: the model has a method for their features, and tells their placeholders."""
    return hasattr(body, "get_video_features") and hasattr(body, "get_placeholder_mask")


def kinds_of(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Kinds whose pixels are among the encoder's inputs."""
    found = {"video" if "video" in key else "image" for key, value in inputs.items() if is_pixels(key) and _is(value)}
    return tuple(kind for kind in KINDS if kind in found)


def has_videos(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs of the encoder or of the LLM tell of videos."""
    return any("video" in key and _is(value) for key, value in inputs.items())


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
        return torch.full((int(images.sum()),), has_videos(inputs), device=ids.device)
    return videos[images | videos]


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
