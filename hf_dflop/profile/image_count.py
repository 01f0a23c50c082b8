"""What one image becomes: a record small enough to be kept for every size that a dataset holds."""

from dataclasses import dataclass

__all__ = ["ImageCount"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCount:
    """What one image becomes."""

    tiles: int
    """Encoder attention sequences."""
    patches: int
    """Patch positions over all tiles, without class tokens."""
    patches_sq: int
    """Sum over the tiles of (patches of the tile)²."""
    image_tokens: int
    """LLM positions that hold features of this image."""
    folded: str
    """What the processor writes in place of the placeholder, with every run of the feature token written once."""
    runs: tuple[int, ...]
    """Lengths of those runs, in order."""
    feature: str
    """The feature token."""

    @property
    def replacement(self) -> str:
        """What the processor writes in place of the placeholder, in full."""
        first, *pieces = self.folded.split(self.feature)
        return first + "".join(self.feature * run + piece for run, piece in zip(self.runs, pieces, strict=True))
