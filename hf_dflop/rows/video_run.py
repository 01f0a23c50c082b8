"""Run a processor on a video that has a length and a size, but no pixels.

Input: a processor that takes videos, and a `VideoInfo`. Output: the frames that it samples, the text that it writes in
place of the video, and the tensors that it gives, of which those with pixels hold nothing. The frames are a tensor on
torch's meta device, so that sampling, sizes, patches and text are the processor's own code, and no pixel is computed.
It costs tens of milliseconds, and seconds where the text grows to hundreds of thousands of tokens.

Assumption: nothing depends on what is in the pictures. Where something does, the processor fails on tensors without
values, and `ProcessorError` says so.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.rows.videos import VideoInfo

__all__ = ["VideoRun", "run_without_pixels"]

_NO_VALUES = re.compile(r"\bmeta\b|register_meta")
"""What torch says when values of a tensor on the meta device are asked for; "metadata" is another matter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRun:
    """What a processor makes of a video."""

    indices: tuple[int, ...]
    """The frames that it samples, in order."""
    replacement: str
    """What it writes in place of the placeholder."""
    output: dict[str, Any]
    """Its tensors for this video alone."""


def run_without_pixels(processor: Any, info: VideoInfo) -> VideoRun:
    """Sample and process a video of which only `info` is known.

    Raises:
        DatasetError: the processor refuses a video of this length or size.
        ProcessorError: what it gives depends on what is in the pictures.
    """
    import torch

    shadow = copy.copy(processor)
    shadow.video_processor = shapes = _Shapes(processor.video_processor)
    frames = torch.empty((info.num_frames, 3, info.height, info.width), dtype=torch.uint8, device="meta")
    try:
        output = dict(
            shadow(
                text=[processor.video_token],
                videos=[frames],
                videos_kwargs={
                    "video_metadata": [info.metadata()],
                    "return_metadata": True,
                    "return_tensors": "pt",
                },
                text_kwargs={"return_tensors": None, "padding": False, "truncation": False},
                return_text_replacement_offsets=True,
            )
        )
    except Exception as error:
        if _NO_VALUES.search(str(error)):
            raise ProcessorError(
                f"{type(processor).__name__} makes of a video what depends on its pictures, which are not looked at "
                f"({type(error).__name__})"
            ) from error
        raise DatasetError(
            f"{type(processor).__name__} refuses a video of {info.num_frames} frames of {info.width}x{info.height} "
            f"pixels: {error}"
        ) from error
    ((replaced, *others),) = output.pop("text_replacement_offsets")
    if others or len(shapes.indices) != 1:
        raise ProcessorError(f"{type(processor).__name__} does not report what it writes in place of a video")
    return VideoRun(indices=shapes.indices[0], replacement=str(replaced["replacement"]), output=output)


class _Shapes:
    """A video processor whose pixels are on the meta device: they come out as ones that take no memory."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.indices: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_real"), name)

    def __call__(self, videos: Any, **kwargs: Any) -> Any:
        import torch

        output = self._real(videos, **kwargs)
        self.indices = [tuple(int(i) for i in known.frames_indices) for known in output["video_metadata"]]
        for key, value in output.items():
            # Some processors read sizes through numpy, which a tensor without storage does not give.
            if key.startswith("pixel_values") and isinstance(value, torch.Tensor):
                output[key] = torch.ones((), dtype=value.dtype).expand(value.shape)
        return output
