"""What a video of a given length and size becomes under a processor: encoder tiles and patches, and text for the LLM.

Input: `VideoInfo`. Output: an `ImageCount`, as for an image: a tile is a frame, or a group of frames that become one
patch. The processor itself samples and resizes frames that have a size and no pixels (`rows.video_run`), so that no
rule is written a second time here.

Assumptions: those of `rows.video_run` and of `profile.tiles`. Each video is processed alone: nothing depends on the
others of its row.
"""

from typing import TYPE_CHECKING, Any

from hf_dflop.errors import ProcessorError
from hf_dflop.profile.image_count import ImageCount, fold
from hf_dflop.rows.render import video_token
from hf_dflop.rows.video_run import run_without_pixels
from hf_dflop.rows.videos import VideoInfo

if TYPE_CHECKING:
    from hf_dflop.profile.tokens import TokenCounter

__all__ = ["VideoCounter"]

_MOST_REMEMBERED = 4096
"""Lengths and sizes whose counts are kept; a count holds the text that the processor writes for the video."""


class VideoCounter:
    """Counts tiles, patches and tokens of videos, for one processor.

    Args:
        counter (`TokenCounter`): counts the images of the same processor, and knows the encoder's patch size.
    """

    def __init__(self, counter: "TokenCounter") -> None:
        self._counter = counter
        self._token = video_token(counter.processor)
        self._cache: dict[VideoInfo, ImageCount] = {}

    def count(self, infos: list[VideoInfo]) -> list[ImageCount]:
        """Counts of the videos of one sample; the processor takes videos.

        Raises:
            DatasetError: the processor refuses a video of this length or size.
            ProcessorError: they cannot be counted without their pictures.
        """
        for info in infos:
            if info not in self._cache:
                if len(self._cache) >= _MOST_REMEMBERED:
                    self._cache.clear()
                self._cache[info] = self._count(info)
        return [self._cache[info] for info in infos]

    def _count(self, info: VideoInfo) -> ImageCount:
        run = run_without_pixels(self._counter.processor, info)
        tiles = self._counter.tiles_of(run.output)
        features = (self._token, self._counter.token)
        used = dict.fromkeys(token.feature for token in features if token and token.feature in run.replacement)
        if len(used) != 1 or not tiles:
            raise self._unknown(f"writes {list(used)} for a video and gives {len(tiles)} tiles")
        (feature,) = used
        tokenizer = self._counter.processor.tokenizer
        if len(tokenizer(feature * 3, add_special_tokens=False)["input_ids"]) != 3:
            raise self._unknown(f"repeats {feature!r}, which its tokenizer splits")
        folded, runs = fold(run.replacement, feature)
        return ImageCount.of(tiles, folded, runs, feature)

    def _unknown(self, cause: str) -> ProcessorError:
        name: Any = type(self._counter.processor).__name__
        return ProcessorError(f"videos of {name} cannot be counted: it {cause}")
