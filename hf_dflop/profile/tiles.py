"""Which attention sequences the vision encoder runs, read from what a processor really gave.

Input: the tensors of a processor for some images. Output: patches of each tile. Told apart by the keys and their
dimensions:

    image_grid_thw          one row per image: frames × rows × columns of patches
    video_grid_thw          one row per video: as many tiles as frames (or groups of frames that become one patch)
    target_sizes_videos     one row per frame: rows and columns of patches
    target_sizes            one row per slice: rows and columns of patches (images packed into one row)
    pixel_values, 3 dims    (images, patches, values): padded to one length, and computed at that length
    pixel_values, 4 dims    (tiles, channels, height, width)
    pixel_values, 5 dims    (images, tiles, channels, height, width)

Every key that begins with `pixel_values` is counted (a processor may keep whole images and crops apart, or images and
videos). Tiles whose values are all zero only pad a batch (a normalised black tile is not zero); encoders drop them.

Assumption: the encoder attends within one frame of a video, or within one group of frames that become one patch.
Processors that cut videos into chunks may belong to encoders that attend within a chunk, and are refused.
"""

from collections.abc import Callable
from typing import Any

from hf_dflop.errors import ProcessorError

__all__ = ["encoder_tiles"]


def encoder_tiles(
    batch: dict[str, Any], tile_patches: Callable[[int, int], int], *, native: bool = False
) -> list[int]:
    """Patches of each tile that the encoder runs.

    Args:
        batch (`dict[str, Any]`): the processor's output.
        tile_patches (`Callable[[int, int], int]`): height and width in pixels → patches.
        native (`bool`, defaults to `False`): images of different sizes padded to one, true sizes in `image_sizes`.

    Raises:
        ProcessorError: the tensors have a form that is not known here.
    """
    if "num_chunks_per_video" in batch:
        raise ProcessorError("cuts videos into chunks, and what the encoder attends to in a chunk is not known")
    return _image_tiles(batch, tile_patches, native) + _video_tiles(batch, tile_patches)


def _image_tiles(batch: dict[str, Any], tile_patches: Callable[[int, int], int], native: bool) -> list[int]:
    if "image_grid_thw" in batch:
        return [int(grid.prod()) for grid in batch["image_grid_thw"]]
    if other := sorted(k for k in batch if k.endswith("pixel_values") and k != "pixel_values"):
        raise ProcessorError(f"{other[0]!r} feeds a second vision encoder, whose cost is not modelled")
    if "target_sizes" in batch and "pixel_values" in batch:
        return [int(size[0]) * int(size[1]) for size in batch["target_sizes"]]
    if native and "pixel_values" in batch:
        return [tile_patches(int(h), int(w)) for h, w in batch["image_sizes"]]
    names = sorted(k for k in batch if k.startswith("pixel_values") and "video" not in k)
    return [tile for name in names for tile in _tiles_of(name, batch[name], tile_patches)]


def _video_tiles(batch: dict[str, Any], tile_patches: Callable[[int, int], int]) -> list[int]:
    if "video_grid_thw" in batch:
        return [int(h) * int(w) for t, h, w in batch["video_grid_thw"] for _ in range(int(t))]
    if "target_sizes_videos" in batch:
        return [int(size[0]) * int(size[1]) for size in batch["target_sizes_videos"]]
    if "pixel_values_videos" not in batch:
        return []
    return _tiles_of("pixel_values_videos", batch["pixel_values_videos"], tile_patches)


def _tiles_of(name: str, pixels: Any, tile_patches: Callable[[int, int], int]) -> list[int]:
    if pixels.ndim == 3:
        return [int(pixels.shape[1])] * len(pixels)
    if pixels.ndim not in (4, 5):
        raise ProcessorError(f"{name} has {pixels.ndim} dimensions; expected 3 to 5")
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
        if any(pixels.stride()):  # one value that stands for all of them pads nothing, and fills no memory
            pixels = pixels[pixels.flatten(1).any(dim=1)]
    return [tile_patches(*pixels.shape[-2:])] * len(pixels)
