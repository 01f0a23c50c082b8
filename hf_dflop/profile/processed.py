"""The fallback where sizes alone do not tell: really process a blank image of each size, and remember.

Input: a processor and the (height, width) of the images of a sample. Output: the text that the processor writes in
place of each image, and its tensors. Exact as long as counts depend on sizes and not on what is in the image.
"""

from collections.abc import Sequence
from typing import Any

from hf_dflop.errors import ProcessorError

__all__ = ["process_blank"]


def process_blank(processor: Any, sizes: Sequence[tuple[int, int]]) -> tuple[list[str], Any]:
    """Replacement texts of blank images of these sizes, and the processor's output.

    Args:
        processor (`ProcessorMixin`): a processor of a vision-language model.
        sizes (`Sequence[tuple[int, int]]`): heights and widths of the images of one sample.

    Raises:
        ProcessorError: the processor does not say what it writes in place of an image.
        Exception: whatever the processor raises for images of these sizes.
    """
    from PIL import Image

    from hf_dflop.rows import Renderer, Row

    parts = [{"type": "image"} for _ in sizes]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    text = Renderer(processor, "all")(Row(messages=turns, images=[None for _ in sizes])).text
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    output = processor(
        text=[text],
        images=[images],
        images_kwargs={"return_tensors": "pt"},
        text_kwargs={"return_tensors": None, "padding": False, "truncation": False},
        return_text_replacement_offsets=True,
    )
    replaced = output.get("text_replacement_offsets")
    if not replaced or len(replaced[0]) != len(images):
        raise ProcessorError(f"{type(processor).__name__} does not report what it writes in place of an image")
    return [str(entry["replacement"]) for entry in replaced[0]], output
