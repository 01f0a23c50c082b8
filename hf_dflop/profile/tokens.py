"""What an image of a given size becomes under a processor: encoder tiles and patches, and text for the LLM.

Input: (height, width). Output: `ImageCount`. Nothing is decoded or resized: the processor's own arithmetic is
called with the size, and its own `replace_image_token` writes what it puts in place of the image. Only where that
is not possible, a blank image of each size is really processed, once.

Processors are told apart by the structure of their image processor, never by their name:

    anyres     grid pinpoints (LLaVA-NeXT, LLaVA-OneVision): a base tile and the tiles of the best grid
    crops      pan and scan (Gemma 3): the whole image and its crops
    rows       rows and columns of tiles (Idefics3, SmolVLM)
    grid       one patch grid per image, merged before the LLM (Qwen2-VL and its kin, GLM-4V)
    tiles      a number of equal tiles (InternVL, Aya Vision, GOT-OCR2)
    native     one patch grid per image with row breaks (Pixtral, Mistral 3)
    fixed      one square per image (LLaVA, PaliGemma)
    none       the processor takes sounds and no images
    processed  none of these: the images of a sample are processed as blank ones of their sizes, and remembered

What the helper `_get_num_multimodal_tokens` reports is not used: it says one "patch" for tiled LLaVA images, 256
tokens for a panned Gemma 3 image, and is missing in SmolVLM. Whatever structure is recognised, an image of noise is
really processed once and must agree; where it does not, images are processed.

Assumptions: counts depend on the size of an image and on whether it is alone in its sample, on nothing else.
Tiles that exist only to pad a batch are not counted, since the models drop them before the encoder.
"""

import functools
import logging
from typing import Any

import numpy as np

from hf_dflop.errors import DflopError, ProcessorError
from hf_dflop.profile.audio_count import AudioCounter
from hf_dflop.profile.image_count import ImageCount, fold
from hf_dflop.profile.processed import process_blank
from hf_dflop.profile.tiles import encoder_tiles
from hf_dflop.rows.render import audio_token, feature_ids, image_token_or_none

__all__ = ["TokenCounter"]

logger = logging.getLogger(__name__)

_PROBE = (300, 750)
"""Height and width of the image that is really processed: oblong enough to be tiled, small enough to be quick."""
_MOST_REMEMBERED = 16_384
"""Sizes whose counts are kept, so that a dataset of as many sizes as pictures does not fill the memory."""
_STRIP = 3
"""Images so thin that some processors take their rows for channels, or shrink them to nothing, and refuse: these are
really processed before they are counted."""


class TokenCounter:
    """Counts tiles, patches and tokens of images from their sizes, for one processor.

    Args:
        processor (`ProcessorMixin`): a processor of a vision-language model.
        config (`PreTrainedConfig`, *optional*): configuration of the model; needed where the processor does not
            know the encoder's patch size (Idefics3, SmolVLM, InternVL, Aya Vision, Gemma 3, PaliGemma).

    Raises:
        ProcessorError: the patch size is missing, or a really processed image gives other counts than one of the
            same size that was counted.

    Example:
        >>> counter = TokenCounter(processor)                                            # doctest: +SKIP
        >>> counter.count([(480, 640)])[0].image_tokens                                  # doctest: +SKIP
        391
    """

    def __init__(self, processor: Any, config: Any = None) -> None:
        takes_media = hasattr(processor, "image_processor") or hasattr(processor, "audio_token")
        if not takes_media or not hasattr(processor, "tokenizer"):
            raise ProcessorError(
                f"{type(processor).__name__} has no image processor and tokenizer; pass the model's processor "
                "(AutoProcessor), not its tokenizer or image processor"
            )
        self.processor = processor
        self.token: Any = image_token_or_none(processor)
        self.feature_ids = feature_ids(processor)
        self.audio = None if audio_token(processor) is None else AudioCounter(processor, config)
        self._cache: dict[tuple[int, int, bool], ImageCount] = {}
        self._processed: dict[tuple[tuple[int, int], ...], list[ImageCount]] = {}
        if self.token is None:  # takes sounds alone
            self.structure, self.patch_size = "none", None
            return
        self.structure = self._recognise()
        self.patch_size = self._find_patch_size(config)
        self.counts_alone = "batch_num_images" in getattr(processor.image_processor, "model_input_names", ())
        self._folds = self._feature_is_one_token()
        self._check_probe()

    def count(self, sizes: list[tuple[int, int]]) -> list[ImageCount]:
        """Counts of the images of one sample, from their (height, width).

        Raises:
            ValueError: the processor itself refuses an image of this size.
        """
        if not sizes or self.token is None:
            return []  # of a row with images that are not taken, the renderer says why
        if self.structure == "processed":
            return self._process(tuple(sizes))
        alone = len(sizes) == 1 or not self.counts_alone
        counts = []
        for height, width in sizes:
            key = (height, width, alone)
            if key not in self._cache:
                if min(height, width) <= _STRIP:
                    self._process(((height, width),))
                if len(self._cache) >= _MOST_REMEMBERED:
                    self._cache.clear()
                self._cache[key] = self._count(height, width, alone)
            counts.append(self._cache[key])
        return counts

    def tile_patches(self, height: int, width: int) -> int:
        """Patches of an encoder input of this many pixels."""
        if self.patch_size is None:
            if not getattr(self.processor, "num_image_tokens", None):
                raise self._no_patch_size(None)
            return int(self.processor.num_image_tokens)
        return (height // self.patch_size[0]) * (width // self.patch_size[1])

    def _recognise(self) -> str:
        processor, images = self.processor, self.processor.image_processor
        if not hasattr(processor, "replace_image_token"):
            return "processed"
        if getattr(images, "image_grid_pinpoints", None) and hasattr(processor, "_get_number_of_features"):
            return "anyres"
        if hasattr(images, "pan_and_scan") or hasattr(images, "do_pan_and_scan"):
            return "crops"
        if hasattr(images, "get_number_of_image_patches"):
            counted = self._call_image_processor(*_PROBE)
            if isinstance(counted, tuple):
                return "rows"
            return "grid" if hasattr(images, "merge_size") else "tiles"
        if hasattr(processor, "image_break_token") and hasattr(processor, "spatial_merge_size"):
            return "native"
        if self._tile_pixels() is not None:
            return "fixed"
        return "processed"

    def _unknown(self, cause: str) -> ProcessorError:
        return ProcessorError(
            f"{type(self.processor).__name__} cannot be counted, neither from the sizes of images nor by processing "
            f"blank ones: it {cause}"
        )

    def _find_patch_size(self, config: Any) -> tuple[int, int] | None:
        """Patch height and width of the encoder, from the config and the processor, which must agree."""
        processor = self.processor
        if self.structure == "grid":
            return None
        own = getattr(processor, "patch_size", None) if self.structure in ("anyres", "native", "fixed") else None
        vision = getattr(config, "vision_config", None)
        told = getattr(vision, "patch_size", None)
        if own is not None and told is not None and _pair(own) != _pair(told):
            raise ProcessorError(
                f"the processor says patch size {own}, the model's vision config {told}; make them equal"
            )
        if told is None and own is None:
            if self.structure == "processed" or getattr(processor, "num_image_tokens", None):
                return None
            raise self._no_patch_size(config)
        return _pair(own if told is None else told)

    def _no_patch_size(self, config: Any) -> ProcessorError:
        return ProcessorError(
            f"{type(self.processor).__name__} does not know the patch size of the vision encoder; pass "
            "config=AutoConfig.from_pretrained(...) of the model"
            + ("" if config is None else f" ({type(config).__name__} has no vision_config.patch_size)")
        )

    def _count(self, height: int, width: int, alone: bool) -> ImageCount:
        inputs: dict[str, Any] = {"batch_num_images": [1 if alone else 2]}
        tiles, patches = 1, 0
        if self.structure == "anyres":
            tile = self._tile_pixels()
            assert tile is not None
            inputs |= {
                "image_sizes": [(height, width)],
                "pixel_values": [[np.broadcast_to(np.float32(0), (3, *tile))]],
            }
            tiles = self._anyres_tiles(height, width, tile) if alone else 1
            patches = self.tile_patches(*tile)
        elif self.structure == "crops":
            crops = self._crops(height, width)
            inputs["num_crops"] = [crops]
            tiles, patches = 1 + crops, self.tile_patches(*self._fixed_tile())
        elif self.structure == "rows":
            counted, rows, columns = self._call_image_processor(height, width)
            inputs |= {"rows": [[rows]], "cols": [[columns]]}
            side = int(self.processor.image_processor.max_image_size["longest_edge"])
            tiles, patches = max(1, counted), self.tile_patches(side, side)
        elif self.structure == "grid":
            patches = int(self._call_image_processor(height, width))
            inputs["image_grid_thw"] = np.array([[1, 1, patches]])
        elif self.structure == "tiles":
            tiles = int(self._call_image_processor(height, width))
            inputs["num_patches"] = [tiles]
            patches = self.tile_patches(*self._fixed_tile())
        elif self.structure == "native":
            resized = self._native_pixels(height, width)
            inputs["image_sizes"] = [resized]
            patches = self.tile_patches(*resized)
        else:
            tile = self._fixed_tile()
            inputs["pixel_values"] = np.broadcast_to(np.float32(0), (1, 3, *tile))
            patches = self.tile_patches(*tile)
        return self._image_count(str(self.processor.replace_image_token(inputs, 0)), [patches] * tiles)

    def _process(self, sizes: tuple[tuple[int, int], ...]) -> list[ImageCount]:
        """The images of one sample, processed together; the tiles of all of them are told of the first."""
        if sizes not in self._processed:
            texts, output = process_blank(self.processor, sizes)
            tiles = self.tiles_of(output)
            if len(self._processed) >= _MOST_REMEMBERED:
                self._processed.clear()
            self._processed[sizes] = [self._image_count(text, [] if i else tiles) for i, text in enumerate(texts)]
        return self._processed[sizes]

    def tiles_of(self, output: Any) -> list[int]:
        """Patches of each encoder tile, from what the processor gave."""
        if self.token is None:
            return []
        return encoder_tiles(output, self.tile_patches, native=self.structure == "native")

    def _image_count(self, replacement: str, tiles: list[int]) -> ImageCount:
        folded, runs = self._fold(replacement)
        return ImageCount.of(tiles, folded, runs, self.token.feature)

    def _call_image_processor(self, height: int, width: int) -> Any:
        return self.processor.image_processor.get_number_of_image_patches(height, width, dict(self._image_kwargs))

    @functools.cached_property
    def _image_kwargs(self) -> dict[str, Any]:
        """The processor's own defaults for its image processor, which differ from the image processor's."""
        try:
            declared = getattr(self.processor, "valid_processor_kwargs", None)  # what an older transformers wants
            return dict(self.processor._merge_kwargs(declared)["images_kwargs"])
        except (AttributeError, TypeError, KeyError):
            return dict(getattr(self.processor, "images_kwargs", {}))

    def _setting(self, name: str) -> Any:
        value = self._image_kwargs.get(name)
        return getattr(self.processor.image_processor, name, None) if value is None else value

    def _tile_pixels(self) -> tuple[int, int] | None:
        """Height and width of the one size that every tile has, if there is one."""
        size = self._setting("size") or {}
        if self._setting("do_center_crop") and self._setting("crop_size"):
            size = self._setting("crop_size")
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if (
            self.__dict__.get("structure") in (None, "anyres")
            and "shortest_edge" in size
            and "longest_edge" not in size
        ):
            anyres = hasattr(self.processor, "_get_number_of_features")
            return (int(size["shortest_edge"]),) * 2 if anyres else None
        return None

    def _fixed_tile(self) -> tuple[int, int]:
        tile = self._tile_pixels()
        if tile is None:
            raise self._unknown("has no fixed tile size")
        return tile

    def _anyres_tiles(self, height: int, width: int, tile: tuple[int, int]) -> int:
        from transformers.image_processing_utils import select_best_resolution

        best = select_best_resolution((height, width), self.processor.image_processor.image_grid_pinpoints)
        return 1 + -(-best[0] // tile[0]) * -(-best[1] // tile[1])

    def _crops(self, height: int, width: int) -> int:
        if not self._setting("do_pan_and_scan"):
            return 0
        names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        settings = {f"pan_and_scan_{name}": self._setting(f"pan_and_scan_{name}") for name in names}
        # Slices of an array that has a shape and one byte: the processor's own rule, without pixels.
        picture = np.broadcast_to(np.uint8(0), (3, height, width))
        return len(self.processor.image_processor.pan_and_scan(picture, **settings))

    def _native_pixels(self, height: int, width: int) -> tuple[int, int]:
        """Pixtral's size after resizing: shrunk to the longest edge, then rounded up to whole merged patches."""
        longest = int(self._setting("size")["longest_edge"])
        side = int(self.processor.patch_size) * int(self.processor.spatial_merge_size)
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = int(height / ratio), int(width / ratio)
            if not height or not width:
                raise ValueError(f"an image this oblong shrinks to nothing at a longest edge of {longest} pixels")
        return ((height - 1) // side + 1) * side, ((width - 1) // side + 1) * side

    def _feature_is_one_token(self) -> bool:
        ids = self.processor.tokenizer(self.token.feature * 3, add_special_tokens=False)["input_ids"]
        return list(ids) == [self.token.feature_id] * 3

    def _fold(self, replacement: str) -> tuple[str, tuple[int, ...]]:
        if not self._folds:
            raise self._unknown(f"repeats {self.token.feature!r}, which its tokenizer splits")
        return fold(replacement, self.token.feature)

    def _check_probe(self) -> None:
        """Process one image and compare; where a structure was recognised wrongly, images are processed from here."""
        cause = self._disagreement()
        if cause is not None and self.structure != "processed":
            logger.warning(
                "%s: images are counted by processing a blank one of each size, which takes longer, since it %s",
                type(self.processor).__name__,
                cause,
            )
            self.structure = "processed"
            self._cache.clear()
            cause = self._disagreement()
        if cause is not None:
            raise self._unknown(cause)

    def _disagreement(self) -> str | None:
        """What is wrong with the counts of an image of noise, if something is."""
        from PIL import Image

        from hf_dflop.profile.verify import measure
        from hf_dflop.rows import Row, encode

        part = {"role": "user", "content": [{"type": "image"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": "x"}]}
        noise = np.random.default_rng(0).integers(0, 256, (*_PROBE, 3), dtype=np.uint8)
        row = Row(messages=[part, said], images=[Image.fromarray(noise)])
        try:
            expected = self.count([_PROBE])[0]
            found = measure(encode(self.processor, [row], labels="all"), self)
        except Exception as error:
            if isinstance(error, ProcessorError) and self.structure == "processed":
                raise
            told = str(error) if isinstance(error, DflopError) else f"{type(error).__name__}: {error}"
            return f"fails on an image ({told})"
        for name in ("tiles", "patches", "patches_sq", "tokens"):
            column = "image_" + name
            said_count = getattr(expected, column if name == "tokens" else name)
            if said_count != found[column]:
                return (
                    f"has structure {self.structure!r}, but an image of {_PROBE[1]}x{_PROBE[0]} gives "
                    f"{found[column]} {name} where {said_count} were computed"
                )
        if not expected.image_tokens or expected.replacement == self.token.placeholder:
            return "puts no image features into the LLM's sequence"
        return None


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    if isinstance(value, list | tuple):
        return int(value[-2]), int(value[-1])
    return int(value), int(value)
