"""Count what a really processed row holds, and compare it with the annotation.

Input: the tensors of `rows.encode` for one row. Output: the counts of `Shapes`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from hf_dflop.errors import ShapeMismatchError
from hf_dflop.rows import Row, encode
from hf_dflop.rows.render import Renderer

if TYPE_CHECKING:
    from hf_dflop.profile.tokens import TokenCounter

__all__ = ["check_row", "measure"]


def measure(batch: dict[str, Any], counter: "TokenCounter") -> dict[str, int]:
    """The counts of a batch of one row, by the field names of `Shapes`; numbers of images and sounds are left out."""
    tiles = counter.tiles_of(batch)
    length = int(batch["attention_mask"].sum())
    chunks = [] if counter.audio is None else counter.audio.chunks_of(batch)
    features = int(np.isin(batch["input_ids"].numpy(), counter.feature_ids).sum())
    heard = () if counter.audio is None else (counter.audio.token.feature_id,)
    audio_tokens = int(np.isin(batch["input_ids"].numpy(), heard).sum())
    image_tokens = features - audio_tokens
    return {
        "image_tiles": len(tiles),
        "image_patches": sum(tiles),
        "image_patches_sq": sum(patches**2 for patches in tiles),
        "image_tokens": image_tokens,
        "text_tokens": length - features,
        "audio_chunks": len(chunks),
        "audio_frames": sum(chunks),
        "audio_frames_sq": sum(frames**2 for frames in chunks),
        "audio_tokens": audio_tokens,
        "label_tokens": int((batch["labels"][:, 1:] != -100).sum()),
    }


def check_row(
    processor: Any,
    row: Row,
    counted: dict[str, int],
    counter: "TokenCounter",
    renderer: Renderer,
    max_length: int | None,
) -> None:
    """Process a row and compare every count.

    Raises:
        ShapeMismatchError: a count differs; names the row, the column and both numbers.
    """
    batch = encode(processor, [row], labels=renderer.labels, max_length=max_length, renderer=renderer)
    for name, found in measure(batch, counter).items():
        if counted[name] != found:
            raise ShapeMismatchError(
                f"{row.name}: column dflop_{name} was computed as {counted[name]}, but the processor gives {found}. "
                "Nothing was written. The processor and its config may belong to different models; otherwise this "
                "processor cannot be counted from image sizes"
            )
