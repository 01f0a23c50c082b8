"""Synthetic data mixes: how many tiles and text tokens the samples of a mixture have.

In: a mix's name, a number of samples, a seed. Out: kinds of samples as counts. Two mixes are generated:

    onevision   the published shares of the LLaVA-OneVision stage: single images 24.3 % (2 to 31 tiles), several
                images 43.0 % (one tile each), video 25.8 % (4 to 32 frames, one tile each), text alone 6.9 %
    chart_doc   ai2d, chartqa, docvqa and synthdog in the proportion of their sizes, each with its published shares of
                tiles, and text lengths drawn to the published mean and median

Assumptions: shares of kinds are published numbers; what lies within a kind (the distribution of frames, of images, the
spread of text around its mean) is a guess within the published ranges. Tiles and text of a sample are independent
given its kind: published correlations lie between -0.22 and 0.07.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MIXES", "Samples", "draw_mix"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Samples:
    """Counts of each sample, `(num_samples,)`."""

    num_images: Ints
    tiles_per_image: Ints
    """Tiles of each image of the sample (its images are alike); 0 without one."""
    tokens_per_tile: Ints
    """LLM tokens of a tile in the model that the numbers were published for."""
    text_tokens: Ints

    @property
    def tiles(self) -> Ints:
        return self.num_images * self.tiles_per_image

    @property
    def llm_tokens(self) -> Ints:
        """LLM tokens in the model that the numbers were published for."""
        return self.tiles * self.tokens_per_tile + self.text_tokens


def _onevision(rng: np.random.Generator) -> tuple[int, int, int, float]:
    kind = rng.choice(4, p=[0.243, 0.430, 0.258, 0.069])
    text = rng.lognormal(4.7, 0.65)
    if kind == 0:  # tiles of a single image, with the tokens per tile that its anyres rule gives
        tiles, tokens = [(2, 378), (5, 420), (7, 571), (9, 582), (31, 214)][
            rng.choice(5, p=[0.12, 0.48, 0.20, 0.08, 0.12])
        ]
        return 1, tiles, tokens, text
    if kind == 1:
        return min(1 + int(rng.geometric(0.4)), 12), 1, 730, text
    if kind == 2:
        return int(np.clip(rng.gamma(3, 6), 4, 32)), 1, 210, text
    return 0, 0, 0, rng.lognormal(6.2, 0.7)


# For each set: samples, {tiles: share}, (median, mean) of text tokens; 256 tokens a tile.
_CHART_DOC = {
    "ai2d": (12_413, {1: 0.467, 3: 0.299, 4: 0.049, 5: 0.185}, (52, 54)),
    "chartqa": (18_317, {2: 0.046, 3: 0.046, 5: 0.908}, (66, 89)),
    "docvqa": (10_211, {2: 0.004, 3: 0.186, 5: 0.81}, (231, 282)),
    "synthdog": (29_765, {3: 0.58, 5: 0.42}, (110, 120)),
}


def _chart_doc(rng: np.random.Generator) -> tuple[int, int, int, float]:
    sizes = np.array([size for size, _, _ in _CHART_DOC.values()], dtype=np.float64)
    _, shares, (middle, mean) = list(_CHART_DOC.values())[rng.choice(len(sizes), p=sizes / sizes.sum())]
    tiles = int(rng.choice(list(shares), p=list(shares.values())))
    # A lognormal with this median and mean.
    return 1, tiles, 256, rng.lognormal(np.log(middle), np.sqrt(2 * np.log(mean / middle)))


MIXES: dict[str, Callable[[np.random.Generator], tuple[int, int, int, float]]] = {
    "onevision": _onevision,
    "chart_doc": _chart_doc,
}
"""Draws of one sample, by name of the mix: images, tiles of each, tokens per tile, text tokens."""


def draw_mix(name: str, num_samples: int, seed: int) -> Samples:
    """Draw samples of a mix.

    Raises:
        ValueError: there is no such mix.
    """
    if name not in MIXES:
        raise ValueError(f"unknown mix {name!r}; choose one of {', '.join(MIXES)}")
    rng = np.random.default_rng(seed)
    drawn = np.array([MIXES[name](rng) for _ in range(num_samples)])
    images, tiles, tokens, text = drawn.T
    return Samples(
        num_images=images.astype(np.int64),
        tiles_per_image=tiles.astype(np.int64),
        tokens_per_tile=tokens.astype(np.int64),
        text_tokens=np.maximum(text, 8).astype(np.int64),
    )
