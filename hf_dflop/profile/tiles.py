"""Which attention sequences the vision encoder runs, read from what a processor really gave.

Input: the tensors of a processor for some images. Output: patches of each tile. Told apart by the keys and their
dimensions:

    image_grid_thw          one row per image: frames × rows × columns of patches
    target_sizes            one row per slice: rows and columns of patches (images packed into one row)
    pixel_values, 3 dims    (images, patches, values): padded to one length, and computed at that length
    pixel_values, 4 dims    (tiles, channels, height, width)
    pixel_values, 5 dims    (images, tiles, channels, height, width)

Every key that begins with `pixel_values` is counted (a processor may keep whole images and crops apart). Tiles
whose values are all zero only pad a batch (a normalised black tile is not zero); encoders drop them.
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
    if "image_grid_thw" in batch:
        return [int(grid.prod()) for grid in batch["image_grid_thw"]]
    if other := sorted(k for k in batch if k.endswith("pixel_values") and k != "pixel_values"):
        raise ProcessorError(f"{other[0]!r} feeds a second vision encoder, whose cost is not modelled")
    if "target_sizes" in batch and "pixel_values" in batch:
        return [int(size[0]) * int(size[1]) for size in batch["target_sizes"]]
    if native and "pixel_values" in batch:
        return [tile_patches(int(h), int(w)) for h, w in batch["image_sizes"]]
    tiles = []
    for name in sorted(k for k in batch if k.startswith("pixel_values") and "video" not in k):
        pixels = batch[name]
        if pixels.ndim == 3:
            tiles += [int(pixels.shape[1])] * len(pixels)
            continue
        if pixels.ndim not in (4, 5):
            raise ProcessorError(f"{name} has {pixels.ndim} dimensions; expected 3 to 5")
        if pixels.ndim == 5:
            pixels = pixels.flatten(0, 1)
            pixels = pixels[pixels.flatten(1).any(dim=1)]
        tiles += [tile_patches(*pixels.shape[-2:])] * len(pixels)
    return tiles
