"""Rows with sounds of very different length, and tiny models that hear them. Used by the launched script."""

from typing import Any

import datasets
import numpy as np
import torch
import transformers as tf

from hf_dflop import VisionLanguageCollator
from tests.unit.rows.sounds import sound

AUDIO = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
TEXT = {"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def rows(count: int, *, longest_s: float, images: bool = False) -> datasets.Dataset:
    """`count` rows, a quarter of them without a sound, and with `images` half of them with a picture."""
    generator = np.random.default_rng(0)
    data: dict[str, list[Any]] = {"id": list(range(count)), "question": [], "answer": [], "audio": []}
    if images:
        data["image"] = []
    for number in range(count):
        words = int(generator.lognormal(2, 0.9)) + 1
        length = int(np.clip(generator.lognormal(0, 1), 0.1, longest_s) * 16_000)
        data["question"].append("What is it?")
        data["answer"].append(" ".join(generator.choice(["a", "cat", "the sea"], words)))
        data["audio"].append(None if number % 4 == 3 else {"bytes": sound("wav", length), "path": None})
        if images:
            data["image"].append(picture(generator) if number % 2 else None)
    return datasets.Dataset.from_dict(data)


def picture(generator: np.random.Generator) -> dict[str, Any]:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    height, width = generator.integers(30, 200, 2).tolist()
    Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


class Collate:
    """The collator's microbatch in the model's precision, and the ids of its samples."""

    def __init__(self, processor: Any, dtype: torch.dtype) -> None:
        self.collator = VisionLanguageCollator(processor)
        self.dtype = dtype

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in self.collator(features).items()
        }
        return batch | {"sample_ids": torch.tensor([row["id"] for row in features])}


def audioflamingo3(processor: Any) -> Any:
    sizes = dict(zip(("num_mel_bins", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
                     AUDIO.values(), strict=True))  # fmt: skip
    torch.manual_seed(0)
    return tf.AudioFlamingo3ForConditionalGeneration(
        tf.AudioFlamingo3Config(
            audio_config={"model_type": "audioflamingo3_encoder", **sizes, "max_source_positions": 50},
            text_config={**TEXT, "vocab_size": len(processor.tokenizer)},
            audio_token_id=processor.audio_token_id,
        )
    )


def qwen2_audio(processor: Any, seconds: int) -> Any:
    torch.manual_seed(0)
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", **AUDIO, "max_source_positions": 50 * seconds},
            text_config={**TEXT, "vocab_size": len(processor.tokenizer)},
            audio_token_index=processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        )
    )


def qwen2_5_omni(processor: Any) -> Any:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration

    token = processor.tokenizer.convert_tokens_to_ids
    text = {key: value for key, value in TEXT.items() if key != "model_type"}
    torch.manual_seed(0)
    return Qwen2_5OmniThinkerForConditionalGeneration(
        Qwen2_5OmniThinkerConfig(
            audio_config={**AUDIO, "n_window": 50, "output_dim": TEXT["hidden_size"]},
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 14,
                "out_hidden_size": TEXT["hidden_size"], "fullatt_block_indexes": [1], "window_size": 56,
            },
            text_config={
                **text, "vocab_size": len(processor.tokenizer),
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
            },
            audio_token_id=token("<|AUDIO|>"), image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"), audio_start_token_id=token("<|audio_bos|>"),
            audio_end_token_id=token("<|audio_eos|>"),
        )
    )  # fmt: skip
