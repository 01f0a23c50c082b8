"""A tiny LLaVA built from its config, and rows of very different cost for it. Used by the launched scripts."""

import copy
import functools
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_dflop.shapes import Shapes

IMAGE_TOKEN = 3
PATCHES = 4
VOCAB = 64


def model(dtype: torch.dtype = torch.float32, *, freeze_vision: bool = False) -> Any:
    """With the same weights each time, and the same random numbers to come."""
    torch.manual_seed(0)
    built = copy.deepcopy(_built()).to(dtype)
    if freeze_vision:
        for parameter in built.model.vision_tower.parameters():
            parameter.requires_grad_(False)
    return built


@functools.cache
def _built() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
        ),
        image_token_id=IMAGE_TOKEN, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=PATCHES, attn_implementation="sdpa",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def rows(count: int, seed: int = 0, *, text_only: bool = True) -> tuple[Dataset, Shapes]:
    """`count` rows with 0 to 6 images and 4 to 60 text tokens, and their shapes."""
    generator = np.random.default_rng(seed)
    low = 0 if text_only else 1
    images = np.minimum(generator.geometric(0.5, count) - 1 + low, 6)
    text = np.clip(generator.lognormal(2.5, 0.8, count), 4, 60).astype(int)
    return rows_of(images, text, generator)


def two_kinds(count: int, seed: int = 0) -> tuple[Dataset, Shapes]:
    """`count` rows, half of them many images with a short text, half long text alone: wrong costs show at once."""
    generator = np.random.default_rng(seed)
    has_images = generator.random(count) < 0.5
    images = np.where(has_images, generator.integers(3, 7, count), 0)
    text = np.where(has_images, generator.integers(4, 12, count), generator.integers(20, 60, count))
    return rows_of(images, text, generator)


def rows_of(images: Any, text: Any, generator: np.random.Generator) -> tuple[Dataset, Shapes]:
    """Rows with so many images and text tokens each."""
    count = len(images)
    ids, labels = [], []
    for index in range(count):
        words = generator.integers(4, VOCAB, text[index]).tolist()
        sequence = [IMAGE_TOKEN] * (PATCHES * int(images[index])) + words
        ids.append(sequence)
        labels.append([-100] * (len(sequence) - len(words) // 2) + words[len(words) - len(words) // 2 :])
    shapes = Shapes(
        num_images=images,
        image_tiles=images,
        image_patches=images * PATCHES,
        image_patches_sq=images * PATCHES**2,
        image_tokens=images * PATCHES,
        text_tokens=text,
        label_tokens=np.array([sum(label != -100 for label in row[1:]) for row in labels]),
    )
    columns = {"id": list(range(count)), "input_ids": ids, "labels": labels, "images": images.tolist()}
    dataset = Dataset.from_dict(columns | {name: c.tolist() for name, c in shapes.to_columns().items()})
    return dataset, shapes


class Collate:
    """Pads on the right; the pixels of a sample follow from its id alone.

    With `dummy`, a microbatch without images gets one more row: an image, and no label.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, dummy: bool = False) -> None:
        self.dtype = dtype
        self.dummy = dummy

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [f["id"] for f in features]
        if self.dummy and not any(f["images"] for f in features):
            row = {"id": -1, "input_ids": [IMAGE_TOKEN] * PATCHES + [4], "labels": [-100] * (PATCHES + 1), "images": 1}
            features = [*features, row]
        longest = max(len(row["input_ids"]) for row in features)
        batch = {
            "input_ids": torch.tensor([f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]),
            "attention_mask": torch.tensor(
                [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
            ),
            "labels": torch.tensor([f["labels"] + [-100] * (longest - len(f["labels"])) for f in features]),
            "sample_ids": torch.tensor(ids),
        }
        pixels = []
        for row in features:
            generator = torch.Generator().manual_seed(row["id"] + 1)
            pixels += [torch.randn(3, 8, 8, generator=generator, dtype=self.dtype) for _ in range(row["images"])]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        return batch
