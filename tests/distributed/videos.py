"""Tiny models of families that take videos, and rows of images, videos, both and neither. Used by launched scripts."""

import copy
import functools
import inspect
from typing import Any

import numpy as np
import torch
import transformers as tf

from hf_dflop.data import VisionLanguageCollator
from hf_dflop.pipeline import MicrobatchShape, StepShape
from tests.distributed import pipelines as p
from tests.unit.profile.test_videos import MODELS, TEXT, TOWER, frames, processor

MODELS_TAKE_FEATURES = "mm_encoder_outputs" in inspect.signature(tf.Qwen2_5_VLModel.forward).parameters
"""Before transformers 5.18 they do not, and videos are refused."""
LAYERS = 4
ONE_TOKEN = ("glm4v",)
"""Images and videos have the same token: the stock model takes no microbatch with both."""
CASES = {
    **MODELS,
    "llava_next_video": (
        "LlavaNextVideoConfig",
        TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14},
        TEXT | {"model_type": "llama"},
        {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    ),
}
SIDES = {"llava_onevision": 96, "internvl": 96, "llava_next_video": 56}
"""Side of what goes into the tower, of families whose processors stack videos: they must be of one length."""


@functools.cache
def stock_processor(family: str) -> Any:
    stock = processor(family)
    for key, value in CASES[family][3].items():
        setattr(stock, key, value)
    stock.video_processor.do_sample_frames = family in SIDES
    if family in SIDES:
        side = SIDES[family]
        stock.video_processor.num_frames, stock.video_processor.fps = 3, None
        stock.image_processor.size = stock.image_processor.crop_size = {"height": side, "width": side}
        if family != "internvl":
            stock.image_processor.image_grid_pinpoints = [[side, side], [side, 2 * side], [2 * side, side]]
    else:
        stock.image_processor.patch_size = stock.video_processor.patch_size
    return stock


def model(family: str, dtype: torch.dtype, **settings: Any) -> Any:
    """The family's model, with these settings of its tower."""
    return build(family, dtype, **settings) if settings else copy.deepcopy(_master(family, dtype))


@functools.cache
def collator(family: str) -> Any:
    return p.Remembering(stock_processor(family))


@functools.cache
def _master(family: str, dtype: torch.dtype) -> Any:
    return build(family, dtype)


def build(family: str, dtype: torch.dtype, **settings: Any) -> Any:
    name, vision, text, _ = CASES[family]
    vision = vision | settings
    stock = stock_processor(family)
    ids = {key: stock.tokenizer.convert_tokens_to_ids(getattr(stock, key)) for key in ("image_token", "video_token")}
    if getattr(stock.image_processor, "merge_size", None):
        vision = vision | {"patch_size": stock.video_processor.patch_size}
    told = {f"{key}_id": value for key, value in ids.items()}
    if family.startswith("llava"):
        told["image_grid_pinpoints"] = stock.image_processor.image_grid_pinpoints
    config = getattr(tf, name)(vision_config=vision, text_config=text | {"num_hidden_layers": LAYERS}, **told)
    torch.manual_seed(0)
    built = tf.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in built.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator, dtype=dtype) * 0.15)
    return built.train()


def row(question: str, clips: Any = (), images: Any = ()) -> dict[str, Any]:
    said = {"role": "assistant", "content": "The sea, then the sea."}
    asked = {"role": "user", "content": " and ".join(["<image>"] * len(images) + ["<video>"] * len(clips)) + question}
    return {"messages": [asked, said], "images": list(images), "videos": list(clips)}


@functools.cache
def cells_of(family: str) -> p.Cells:
    clip, wide, other = frames(6), frames(9, 90, 30, seed=1), frames(4, 30, 80, seed=2)
    picture, tall = frames(1, 60, 60, seed=3)[0], frames(1, 40, 90, seed=4)[0]
    text, short = row("Only text, and of some length?"), row("A video?", [clip])
    two, image = row("First, second?", [wide, other]), row("A picture?", images=[picture])
    both = two if family in ONE_TOKEN else row("Both?", [other], [tall])
    beside = [short, text] if family in ONE_TOKEN else [image, short, text]
    return [[short, text], [image], [text], [], [two], beside, [both], [text, text]]


def shape_of(collator: VisionLanguageCollator, dealt: Any, collate: Any, *, packed: bool) -> StepShape:
    microbatches, labels = [], 0
    for replicas in dealt:
        line = []
        for rows in replicas:
            alone = [collator([one]) for one in rows]
            features = [int(np.isin(b["input_ids"], collator.renderer.feature_ids).sum()) for b in alone]
            tokens = [b["input_ids"].shape[1] for b in alone]
            line.append(MicrobatchShape.of(tokens, features, packed=packed))
            labels += int((collate(rows)["labels"][:, 1:] != -100).sum()) if rows else 0
        microbatches.append(tuple(line))
    return StepShape(microbatches=tuple(microbatches), label_tokens=labels)


def prepare(family: str) -> None:
    """Make what all ranks make."""
    _master(family, torch.float64)
    for rows in filter(None, cells_of(family)):
        collator(family)(rows)
        collator(family).without_pixels(rows)
        for one in rows:
            collator(family)([one])
