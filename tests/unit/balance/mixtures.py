"""Synthetic global batches with the shares of real vision-language mixtures.

Kind shares of the LLaVA-OneVision stage are published (31 % single-image with 6.9 % text-only, 43 % multi-image, 26 %
video); the shapes within a kind are guesses within published ranges.
"""

import numpy as np
import numpy.typing as npt

Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


def _seconds(
    tiles: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], ratio: float, patches_per_tile: int, scale: float
) -> Arrays:
    """Vision and LLM seconds, tokens and patches of each sample; vision:LLM = `ratio` over the whole batch.

    A 7B LLM spends 14e9 FLOPs per token and 200e3 per token squared (28 layers, 3584 wide, causal).
    """
    llm = 14e9 * tokens + scale * 200e3 * tokens.astype(np.float64) ** 2
    llm /= llm.mean()
    vision = tiles / max(tiles.mean(), 1e-9) * ratio
    return vision, llm, tokens, tiles * patches_per_tile


def onevision(num_samples: int, seed: int, ratio: float = 1.0) -> Arrays:
    """Single images, image lists, videos and text in the shares of the OneVision stage."""
    rng = np.random.default_rng(seed)
    tiles = np.zeros(num_samples, dtype=np.int64)
    tokens = np.zeros(num_samples, dtype=np.int64)
    kinds = rng.choice(4, num_samples, p=[0.243, 0.430, 0.258, 0.069])
    single = [(2, 756), (5, 2100), (7, 3996), (9, 5238), (31, 6624)]
    for i, kind in enumerate(kinds):
        if kind == 0:
            tiles[i], image = single[rng.choice(5, p=[0.12, 0.48, 0.20, 0.08, 0.12])]
            tokens[i] = image + rng.lognormal(4.7, 0.65)
        elif kind == 1:
            tiles[i] = min(1 + rng.geometric(0.4), 12)
            tokens[i] = 730 * tiles[i] + rng.lognormal(4.7, 0.65)
        elif kind == 2:
            tiles[i] = int(np.clip(rng.gamma(3, 6), 4, 32))
            tokens[i] = 210 * tiles[i] + rng.lognormal(4.7, 0.65)
        else:
            tiles[i] = 1  # a text-only row is encoded with one dummy tile
            tokens[i] = rng.lognormal(6.2, 0.7)
    return _seconds(tiles, tokens, ratio, 729, 1.0)


def heavy_tailed(num_samples: int, seed: int, ratio: float = 1.0) -> Arrays:
    """Text of widely differing length, images independent of it: the mix on which padding hurts most."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(4, num_samples, p=[0.30, 0.40, 0.22, 0.08])
    tiles = np.select(
        [kinds == 0, kinds == 1, kinds == 2],
        [np.zeros(num_samples), rng.integers(1, 3, num_samples), rng.integers(4, 11, num_samples)],
        16,
    ).astype(np.int64)
    tokens = (16 * tiles + rng.lognormal(4.8, 0.8, num_samples)).astype(np.int64) + 8
    return _seconds(tiles, tokens, ratio, 64, 10.0)
