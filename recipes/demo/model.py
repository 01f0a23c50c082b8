"""Builds the demo's checkpoint: a small vision-language model of stock transformers classes from real weights.

Decides the architecture: `AyaVisionForConditionalGeneration` with the first layers of a DINOv2-shaped ViT-S/14 as
vision encoder, the first layers of SmolLM2-135M-Instruct and its whole tokenizer as LLM, and an untrained connector.
Of the model families that cut a picture into a varying number of tiles, this is one whose processor loads through
plain `AutoProcessor` without torchvision (LLaVA-OneVision's does not: it insists on a video processor), and whose
connector merges patches (3 x 3 here), so that a tile is 37 positions of the encoder and 5 tokens of the LLM: the
two costs of a sample vary apart.

In: the files of `fetch`. Out: a folder that `AutoModelForImageTextToText.from_pretrained` and
`AutoProcessor.from_pretrained` load offline, in float32.

Assumptions: with so few layers the model is no assistant; it is a real starting point whose loss falls. Image and
chat markers that SmolLM2 does not know start from the mean of its embeddings. The LLM's final norm is scaled down:
it was trained for the output of 30 layers, and after the first few would start with a loss far above chance.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["CHAT_TEMPLATE", "DemoModelConfig", "build_model", "build_processor"]

FOLDER = "model"
_STAMP = "demo_model.json"
_PATCH_PIXELS, _MERGE = 14, 3  # side of a patch; patches merged per side by the connector
_IMAGE, _PATCH = "<image>", "<|IMG_PATCH|>"
_FINAL_NORM_SCALE = 0.1  # of 1, 0.1: first loss 18.5, 8.3; loss after 40 AdamW steps 6.2, 6.0
_START, _END = "<|START_OF_IMG|>", "<|END_OF_IMG|>"
_TILE, _GLOBAL_TILE = "<|TILE|>", "<|TILE_GLOBAL|>"

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- parts(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- parts(message['content']) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""ChatML, as SmolLM2's own template but for its default system message; images may stand in any turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModelConfig:
    """How much of the real weights is kept, and how pictures are cut."""

    vision_layers: int = 3
    """Of the encoder's 12 layers: an eighth of the seconds of a document are then the encoder's."""
    llm_layers: int = 2
    """Of the LLM's 30 layers."""
    vocab_size: int | None = None
    """Tokens kept of the LLM's 49,152 (None: all), the first in merge order: a valid BPE with its own ids, for tests
    that must be quick."""
    tile_pixels: int = 84
    """Side of a square tile; a multiple of three times the patch size, 42."""
    max_tiles: int = 6
    """Most tiles of one picture, without the overview tile that is added to more than one."""
    seed: int = 0
    """Of the connector's weights."""

    def __post_init__(self) -> None:
        unit = _PATCH_PIXELS * _MERGE
        if self.tile_pixels % unit or self.tile_pixels < unit:
            raise ValueError(
                f"tile_pixels is {self.tile_pixels}; the connector merges {_MERGE} x {_MERGE} patches of "
                f"{_PATCH_PIXELS} pixels, so it must be a multiple of {unit}"
            )
        if not 1 <= self.vision_layers <= 12:
            raise ValueError(f"vision_layers is {self.vision_layers}; the encoder has 12")
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles is {self.max_tiles}; it must be at least 1")


def build_model(
    cache: Path | str, *, config: DemoModelConfig | None = None, name: str = FOLDER, **changes: Any
) -> Path:
    """Writes the checkpoint into `cache` unless it is there with the same parameters.

    Args:
        cache: The folder that [`~recipes.demo.fetch.fetch`] filled.
        config: What to keep; the defaults where None.
        name: Of the checkpoint's folder in `cache`, so that another model stands beside the demo's.
        changes: Single fields of `config` instead, such as `vision_layers=4`.

    Returns:
        The folder with model and processor.
    """
    from .fetch import fetch

    if config is not None and changes:
        raise ValueError(f"config and {sorted(changes)} were both given; pass the fields in config")
    config = config or DemoModelConfig(**changes)
    folder = Path(cache).resolve() / name
    stamp = {**asdict(config), "format": 2}
    if _read_json(folder / _STAMP) == stamp:
        return folder
    fetched = fetch(cache)
    print(f"[demo] building the model: {config.vision_layers} vision and {config.llm_layers} LLM layers", flush=True)
    partial = folder.with_name(name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    processor = build_processor(fetched.llm_gguf, config)
    model = _assemble(fetched.vision_onnx, fetched.llm_gguf, processor, config)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"[demo] model of {num_parameters / 1e6:.1f} million parameters in {folder}", flush=True)
    return folder


def build_processor(gguf: Path, config: DemoModelConfig) -> Any:
    """Tokenizer and image processor of the demo's model, from the LLM's file."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessorPil, PreTrainedTokenizerFast

    from .weights import first_tokens, read_tokenizer

    original = read_tokenizer(gguf)
    content = original.backend_tokenizer.to_str()
    if config.vocab_size is not None:
        content = first_tokens(content, config.vocab_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",  # not the end of a turn, which has to stay a label
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    markers = [_IMAGE, _START, _END, _PATCH, _TILE, _GLOBAL_TILE]
    markers += [f"{_TILE}_{i}" for i in range(1, config.max_tiles + 1)]
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": config.tile_pixels, "width": config.tile_pixels},
        crop_to_patches=True,
        min_patches=1,
        max_patches=config.max_tiles,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return AyaVisionProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=_PATCH_PIXELS,
        downsample_factor=_MERGE,
        img_size=config.tile_pixels,
        image_token=_IMAGE,
        start_of_img_token=_START,
        end_of_img_token=_END,
        img_patch_token=_PATCH,
        tile_token=_TILE,
        tile_global_token=_GLOBAL_TILE,
        chat_template=CHAT_TEMPLATE,
    )


def _assemble(onnx: Path, gguf: Path, processor: Any, config: DemoModelConfig):  # type: ignore[no-untyped-def]
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        Dinov2Config,
        GenerationConfig,
        LlamaConfig,
    )

    from .weights import read_language_model, read_vision_tower

    tokenizer = processor.tokenizer
    kept = config.vocab_size if config.vocab_size is not None else min(tokenizer.convert_tokens_to_ids([_IMAGE]))
    text_fields, text_state = read_language_model(gguf, num_layers=config.llm_layers, vocab_size=kept)
    vision_state = read_vision_tower(
        onnx, num_layers=config.vision_layers, num_patches_per_side=config.tile_pixels // _PATCH_PIXELS
    )
    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config = LlamaConfig(**{**text_fields, **special_ids, "vocab_size": len(tokenizer)})
    vision_config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=6,
        image_size=config.tile_pixels,
        patch_size=_PATCH_PIXELS,
        use_mask_token=False,  # a parameter that no forward pass would use
    )
    model_config = AyaVisionConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="default",  # drops the class token
        vision_feature_layer=-1,
        downsample_factor=_MERGE,
        tie_word_embeddings=True,
        **special_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AyaVisionForConditionalGeneration(model_config).float()
    model.model.vision_tower.load_state_dict(vision_state)
    embedding = text_state["model.embed_tokens.weight"]
    new = embedding.mean(dim=0, keepdim=True).expand(len(tokenizer) - kept, -1)
    text_state["model.embed_tokens.weight"] = torch.cat([embedding, new])
    model.model.language_model.load_state_dict(
        {name.removeprefix("model."): value for name, value in text_state.items()}
    )
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(_FINAL_NORM_SCALE)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special_ids)
    return model


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
