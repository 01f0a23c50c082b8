"""Tiny real processors, built offline: a byte-level BPE tokenizer and the PIL image processors of transformers."""

import functools
import importlib
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

TEXT = [
    "What is in the image? The picture shows a cat.\n\nIt is\n\n\na photo of the sea. " * 4,
    "User: Assistant:\n\n",
]
SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    *("<start_of_image>", "<image_soft_token>", "<end_of_image>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"),
    *(f"TILE_{i}" for i in range(1, 13)),
    *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOKENIZER: list[str] = []


def tokenizer(bos: bool = False, **named: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer; `named` gives it attributes such as `image_token`."""
    if not _TOKENIZER:
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        model.train_from_iterator(TEXT, trainer)
        model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        _TOKENIZER.append(model.to_str())
    backend = Tokenizer.from_str(_TOKENIZER[0])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )
    return result


def _lenient(build: Any) -> Any:
    """Without torchvision there is no video processor to pass: skip the class check."""
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", return_value=None):
        return build()


def _size(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava() -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=_size(56))
    return LlavaProcessor(
        images,
        tokenizer(bos=True, image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )


PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def llava_next() -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=_size(56), image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images,
        tokenizer(bos=True, image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    images = LlavaOnevisionImageProcessorPil(
        size=_size(54), image_grid_pinpoints=[[54 * i, 54 * j] for i in range(1, 7) for j in range(1, 7)]
    )
    named = tokenizer(image_token="<image>", video_token="<video>")
    return _lenient(
        lambda: LlavaOnevisionProcessor(
            images,
            named,
            None,
            num_image_tokens=9,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            chat_template=CHATML.replace("IMAGE", "<image>\n"),
        )
    )


def _qwen(module: str, name: str, patch: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cls = getattr(importlib.import_module(f"transformers.models.{module}.processing_{module}"), name)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 256 * (2 * patch) ** 2}, patch_size=patch
    )
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    named = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    video = SimpleNamespace(merge_size=2)
    return _lenient(lambda: cls(images, named, video, chat_template=template))


def qwen2_vl() -> Any:
    return _qwen("qwen2_vl", "Qwen2VLProcessor", 14)


def qwen2_5_vl() -> Any:
    return _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor", 14)


def qwen3_vl() -> Any:
    return _qwen("qwen3_vl", "Qwen3VLProcessor", 16)


def internvl() -> Any:
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(size=_size(56), crop_to_patches=True, min_patches=1, max_patches=6)
    named = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    return _lenient(lambda: InternVLProcessor(images, named, None, image_seq_length=4, chat_template=template))


def idefics3() -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(size={"longest_edge": 168}, max_image_size={"longest_edge": 56})
    return Idefics3Processor(
        images, tokenizer(bos=True), image_seq_len=4, chat_template=CHATML.replace("IMAGE", "<image>")
    )


def smolvlm() -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    images = SmolVLMImageProcessorPil(size={"longest_edge": 168}, max_image_size={"longest_edge": 56})
    video = SimpleNamespace(num_frames=4, fps=1)
    template = CHATML.replace("IMAGE", "<image>")
    return _lenient(lambda: SmolVLMProcessor(images, tokenizer(), video, image_seq_len=4, chat_template=template))


def gemma3(pan_and_scan: bool = False) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(size=_size(56))
    named = tokenizer(
        bos=True, boi_token="<start_of_image>", image_token="<image_soft_token>", eoi_token="<end_of_image>"
    )
    template = "{{ bos_token }}" + CHATML.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(images, named, image_seq_length=4, chat_template=template)
    if pan_and_scan:
        _default_for_images(processor, do_pan_and_scan=True, pan_and_scan_min_crop_size=64)
    return processor


def _default_for_images(processor: Any, **settings: Any) -> None:
    """As if the processor's class had these defaults for its image processor."""
    if hasattr(processor, "images_kwargs"):
        processor.images_kwargs = {**processor.images_kwargs, **settings}
        return
    declared = processor.valid_processor_kwargs  # where an older transformers has them

    class Changed(declared, total=False):
        _defaults = declared._defaults | {"images_kwargs": declared._defaults["images_kwargs"] | settings}

    processor.valid_processor_kwargs = Changed


def paligemma() -> Any:
    from transformers import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size=_size(56))
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer())


def pixtral(merge: int = 1) -> Any:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    images = PixtralImageProcessorPil(size={"longest_edge": 160}, patch_size=_size(16))
    template = CHATML.replace("IMAGE", "[IMG]")
    return _pixtral_class()(images, tokenizer(), patch_size=16, spatial_merge_size=merge, chat_template=template)


@functools.cache
def _pixtral_class() -> Any:
    """Pixtral's processor asks for torchvision, for one function that its PIL module has as well."""
    from transformers.models.pixtral import image_processing_pil_pixtral
    from transformers.utils import import_utils

    name = "transformers.models.pixtral.image_processing_pixtral"
    available = {**import_utils.BACKENDS_MAPPING, "torchvision": (lambda: True, "")}
    with (
        mock.patch.object(import_utils, "BACKENDS_MAPPING", available),
        mock.patch.dict(sys.modules, {name: image_processing_pil_pixtral}),
    ):
        source = importlib.util.find_spec("transformers.models.pixtral.processing_pixtral")
        module = importlib.util.module_from_spec(source)
        sys.modules[source.name] = module
        source.loader.exec_module(module)
    return module.PixtralProcessor


def mistral3() -> Any:
    return pixtral(merge=2)


def aya_vision() -> Any:
    from transformers import AyaVisionProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(size=_size(56), min_patches=1, max_patches=6)
    return AyaVisionProcessor(
        images, tokenizer(), patch_size=28, img_size=56, chat_template=CHATML.replace("IMAGE", "<image>")
    )


def gemma3_crops() -> Any:
    return gemma3(pan_and_scan=True)


PROCESSORS = (
    *(llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, idefics3, smolvlm),
    *(gemma3, gemma3_crops, paligemma, pixtral, mistral3, aya_vision),
)
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
"""What `TokenCounter` reads of a model config."""


def config_of(build: Any) -> Any:
    """The config to pass: none where the processor knows its patch size."""
    return CONFIG if build in (internvl, idefics3, smolvlm, gemma3, gemma3_crops, paligemma, aya_vision) else None


def whisper_features(chunk_length: int = 30) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=8, chunk_length=chunk_length)


def audioflamingo3() -> Any:
    """Sounds, one in a row, in chunks of a second."""
    from transformers import AudioFlamingo3Processor

    template = AUDIO_CHATML.replace("SOUND", "<|AUDIO|>").replace("IMAGE", "")
    return AudioFlamingo3Processor(whisper_features(1), tokenizer(), audio_token="<|AUDIO|>", chat_template=template)


def qwen2_audio(chunk_length: int = 30) -> Any:
    """Sounds and no images."""
    from transformers import Qwen2AudioProcessor

    named = tokenizer(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    template = AUDIO_CHATML.replace("SOUND", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    return Qwen2AudioProcessor(whisper_features(chunk_length), named, chat_template=template)


def qwen2_5_omni() -> Any:
    """Images and sounds."""
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28**2, "longest_edge": 256 * 28**2}, patch_size=14)
    named = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", audio_token="<|AUDIO|>",
        vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>", audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
    )  # fmt: skip
    template = AUDIO_CHATML.replace("SOUND", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return _lenient(
        lambda: Qwen2_5OmniProcessor(
            images, SimpleNamespace(merge_size=2), whisper_features(), named, chat_template=template
        )
    )


AUDIO_CHATML = CHATML.replace(
    "{% else %}{{ c['text'] }}", "{% elif c['type'] == 'audio' %}SOUND{% else %}{{ c['text'] }}"
)
