"""The rows that the mixes train on.

In: a mix and a processor. Out: chat rows with images, for training and held out. Rows of the synthetic mixes have
random pictures whose size makes the processor cut them into the wanted number of tiles, and text of common words, a
token each, as long as the mix says.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk

from recipes.benchmarks.common.mixes import draw_mix
from recipes.demo.documents import FEATURES, FOLDER

__all__ = ["load_mix", "picture_sizes"]


def load_mix(
    mix: str, processor: Any, cache: Path, num_train: int, num_eval: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Rows for training and held-out rows of a mix."""
    if mix == "documents":
        splits = load_from_disk(str(cache / FOLDER))
        return splits["train"].select(range(num_train)), splits["eval"].select(range(num_eval))
    rows = _rows(mix, processor, num_train + num_eval, seed)
    made = Dataset.from_list(rows, features=FEATURES)
    return made.select(range(num_train)), made.select(range(num_train, num_train + num_eval))


def picture_sizes(processor: Any, most: int) -> dict[int, tuple[int, int]]:
    """For each number of tiles that a picture can have, the (width, height) of one that gets them."""
    image_processor = processor.image_processor
    side = int(image_processor.size["height"])
    sizes: dict[int, tuple[int, int]] = {}
    for across in range(1, most + 1):
        for down in range(1, most // across + 1):
            width, height = across * side, down * side
            tiles = int(image_processor.get_number_of_image_patches(height, width, {}))
            best = sizes.get(tiles)
            if best is None or width + height < sum(best):
                sizes[tiles] = (width, height)
    return sizes


def _rows(mix: str, processor: Any, count: int, seed: int) -> list[dict[str, Any]]:
    samples = draw_mix(mix, count, seed)
    rng = np.random.default_rng(seed)
    sizes = picture_sizes(processor, int(processor.image_processor.max_patches))
    words = _words(processor.tokenizer)
    pictures = {tiles: _picture(rng, *size) for tiles, size in sizes.items()}
    rows = []
    for i in range(count):
        # An overview tile is added to more than one, so that some counts do not exist: the next larger one.
        wanted = int(samples.tiles_per_image[i])
        tiles = min((there for there in sizes if there >= wanted), default=max(sizes))
        images = int(samples.num_images[i])
        length = int(samples.text_tokens[i])
        asked = max(1, length // 4)
        question = " ".join(rng.choice(words, asked))
        answer = " ".join(rng.choice(words, max(1, length - asked)))
        content: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in range(images)]
        rows.append(
            {
                "id": f"{mix}#{i}",
                "page": mix,
                "images": [{"bytes": pictures[tiles], "path": None}] * images,
                "messages": [
                    {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
            }
        )
    return rows


def _words(tokenizer: Any) -> list[str]:
    """Words that are one token each after a space."""
    found = [
        token[1:]
        for token in tokenizer.get_vocab()
        if token.startswith("Ġ") and token[1:].isalpha() and len(token) > 3
    ]
    return sorted(found)


def _picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A PNG of coarse random colours: its pixels cost what any others do."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.NEAREST).save(file, format="PNG")
    return file.getvalue()
