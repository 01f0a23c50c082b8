"""Image-text conversations with tiny pictures, and a tiny LLaVA and processor for them."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.unit.rows import tiny


def conversations(count: int, *, with_images: float = 1.0) -> Dataset:
    """`count` conversations; of `with_images` = 0.5, every second one has images."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        num_images = int(generator.integers(1, 4))
        if int(number * with_images) == int((number + 1) * with_images):
            num_images = 0
        words = " ".join(generator.choice(["a", "cat", "picture", "the sea"], int(generator.lognormal(2, 0.9)) + 1))
        rows.append(
            {
                "images": [
                    {"bytes": _png(generator, *generator.integers(20, 90, 2).tolist()), "path": None}
                    for _ in range(num_images)
                ],
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}] * num_images
                     + [{"type": "text", "text": "What is in the image?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": words}]},
                ],
            }
        )  # fmt: skip
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"images": List(Image()), "messages": List({"role": Value("string"), "content": List(part)})})
    return Dataset.from_list(rows, features=features)


def _png(generator: np.random.Generator, width: int, height: int) -> bytes:
    import io

    from PIL import Image as Picture

    buffer = io.BytesIO()
    Picture.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def chat_processor() -> Any:
    """TRL adds no special tokens to what the chat template gives, so the template holds them, as real ones do."""
    processor = tiny.llava()
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor


def model(processor: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=len(processor.tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            ),
            image_token_id=processor.image_token_id, vision_feature_layer=-1, image_seq_length=16,
        )
    )  # fmt: skip
