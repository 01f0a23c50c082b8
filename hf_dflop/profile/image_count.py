"""What one image or one video becomes: a record small enough to be kept for every size that a dataset holds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ImageCount", "fold", "unfold"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCount:
    """What one image or one video becomes."""

    tiles: int
    """Encoder attention sequences."""
    patches: int
    """Patch positions over all tiles, without class tokens."""
    patches_sq: int
    """Sum over the tiles of (patches of the tile)²."""
    image_tokens: int
    """LLM positions that hold features of it."""
    folded: str
    """What the processor writes in place of the placeholder, with every run of the feature token written once."""
    runs: tuple[int, ...]
    """Lengths of those runs, in order."""
    feature: str
    """The feature token."""

    @classmethod
    def of(cls, tiles: Sequence[int], folded: str, runs: tuple[int, ...], feature: str) -> "ImageCount":
        """From the patches of each tile and what the processor writes."""
        return cls(
            tiles=len(tiles),
            patches=sum(tiles),
            patches_sq=sum(patches**2 for patches in tiles),
            image_tokens=sum(runs),
            folded=folded,
            runs=runs,
            feature=feature,
        )

    @property
    def replacement(self) -> str:
        """What the processor writes in place of the placeholder, in full."""
        return unfold(self.folded, self.runs, self.feature)


def fold(replacement: str, feature: str) -> tuple[str, tuple[int, ...]]:
    """The text with every run of the feature token written once, and the lengths of the runs.

    Example:
        >>> fold("<<a>xxx<b>xx", "x")
        ('<<a>x<b>x', (3, 2))
    """
    pattern = f"(?:{re.escape(feature)})+"
    runs = tuple(len(run) // len(feature) for run in re.findall(pattern, replacement))
    return re.sub(pattern, lambda _: feature, replacement), runs


def unfold(folded: str, runs: Sequence[int], feature: str) -> str:
    """Inverse of `fold`.

    Example:
        >>> unfold("<<a>x<b>x", (3, 2), "x")
        '<<a>xxx<b>xx'
    """
    first, *pieces = folded.split(feature)
    return first + "".join(feature * run + piece for run, piece in zip(runs, pieces, strict=True))
