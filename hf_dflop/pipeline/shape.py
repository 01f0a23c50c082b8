"""The shapes of a step, which every rank knows before any tensor exists: what receive buffers are sized from.

In: counts per sample (from the shape columns). Out: for each microbatch of each replica the shape of its `input_ids`
and the rows of features, of images and videos, of each of its samples.

Assumptions: a microbatch is padded to its longest sample, or packed into one row; a sample's features stand in the
order of its image and video tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_dflop.errors import ShapeMismatchError

__all__ = ["MicrobatchShape", "StepShape"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrobatchShape:
    """One microbatch of one LLM replica. Without samples, all is zero.

    Example:
        >>> MicrobatchShape.of([12, 7], [4, 0]), MicrobatchShape.of([12, 7], [4, 0], packed=True).length
        (MicrobatchShape(rows=2, length=12, features=(4, 0)), 19)
    """

    rows: int = 0
    length: int = 0
    """`input_ids` has the shape `(rows, length)`."""
    features: tuple[int, ...] = ()
    """Rows of features of each sample (tokens of its images and videos), in the order of the microbatch."""

    @classmethod
    def of(
        cls,
        llm_tokens: Sequence[int],
        image_tokens: Sequence[int],
        *,
        packed: bool = False,
        pad_to_multiple_of: int = 1,
    ) -> "MicrobatchShape":
        """From the LLM positions and image (or video) tokens of its samples, as the collator will lay them out."""
        features = tuple(int(n) for n in image_tokens)
        if not len(llm_tokens):
            return cls()
        if packed:
            return cls(rows=1, length=int(sum(llm_tokens)), features=features)
        length = -(-int(max(llm_tokens)) // pad_to_multiple_of) * pad_to_multiple_of
        return cls(rows=len(llm_tokens), length=length, features=features)

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length

    @property
    def num_features(self) -> int:
        return sum(self.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """All microbatches that one call runs, and what the loss is divided by."""

    microbatches: tuple[tuple[MicrobatchShape, ...], ...]
    """`microbatches[m][d]`: microbatch m of LLM replica d."""
    label_tokens: int
    """Labels after the shift that are not -100, over all samples of the *optimizer* step: more than those of this
    call if gradients are accumulated over several calls."""

    def __post_init__(self) -> None:
        if len({len(replicas) for replicas in self.microbatches}) > 1:
            raise ShapeMismatchError(
                f"microbatches have {[len(r) for r in self.microbatches]} replicas; every microbatch needs one shape "
                "per replica (an empty MicrobatchShape() for a replica without samples)."
            )
        if self.label_tokens < 0:
            raise ShapeMismatchError(f"label_tokens is {self.label_tokens}; it is a count.")

    @property
    def num_microbatches(self) -> int:
        return len(self.microbatches)
