"""The paper's data mix, generated: 65k single images, 60k rows of several images, 60k videos.

In: a mix's name, a number of samples, a seed. Out: `Shapes`. Synthetic: the shares of the three kinds and the tokens
of an image or a frame are published; how tiles, images, frames and text are spread within a kind is a guess within
the published ranges.

    onevision   729 patches a tile; one image: 2 to 31 tiles and 756 to 6,624 tokens; several images: one tile and
                730 tokens each; a video: one tile and 210 tokens a frame, 4 to 32 frames
    internvl    1,024 patches and 256 tokens a tile; one image: 1 to 13 tiles; an image of several, or a frame: one

Tiles and text are independent given the kind: in public length files of such data their correlation is -0.2 to 0.1.
"""

import numpy as np

from hf_dflop.shapes import Shapes

__all__ = ["MIXES", "draw_mix"]

MIXES = ("onevision", "internvl")
_KINDS = np.array([65_000.0, 60_000.0, 60_000.0])
_SINGLE = np.array([0.12, 0.48, 0.20, 0.08, 0.12])
"""Shares of image sizes, from 336² to an A4 scan."""
_SINGLE_TILES = {"onevision": (2, 5, 7, 9, 31), "internvl": (1, 7, 13, 9, 13)}
_SINGLE_TOKENS = (756, 2100, 3996, 5238, 6624)
"""LLM tokens of each size in LLaVA-OneVision."""


def draw_mix(name: str, num_samples: int, seed: int = 0) -> Shapes:
    """Draw samples of a mix.

    Raises:
        ValueError: there is no such mix.
    """
    if name not in MIXES:
        raise ValueError(f"unknown mix {name!r}; choose one of {', '.join(MIXES)}")
    random = np.random.default_rng(seed)
    kind = random.choice(3, num_samples, p=_KINDS / _KINDS.sum())
    size = random.choice(len(_SINGLE), num_samples, p=_SINGLE)
    images = np.minimum(1 + random.geometric(0.4, num_samples), 12)
    frames = np.clip(random.gamma(3.0, 6.0, num_samples), 4, 32).astype(np.int64)
    text = np.maximum(random.lognormal(4.7, 0.65, num_samples), 8).astype(np.int64)
    tiles = np.choose(kind, [np.array(_SINGLE_TILES[name])[size], images, frames])
    patches_per_tile = 729 if name == "onevision" else 1024
    if name == "onevision":
        tokens = np.choose(kind, [np.array(_SINGLE_TOKENS)[size], images * 730, frames * 210])
    else:
        tokens = tiles * 256
    return Shapes(
        num_images=np.choose(kind, [np.ones_like(images), images, frames]),
        image_tiles=tiles,
        image_patches=tiles * patches_per_tile,
        image_patches_sq=tiles * patches_per_tile**2,
        image_tokens=tokens,
        text_tokens=text,
        label_tokens=text // 2,
    )
