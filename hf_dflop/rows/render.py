"""A row as text: one placeholder per image, video and sound, and the character spans that are learned.

Input: a `Row`. Output: `Rendered`. The text comes from the chat template of the processor, else of its tokenizer.
Without a template, turns are joined plainly: their contents in order, a line break between turns, the tokenizer's
end-of-sequence token after each assistant turn, no role names. Processors that take a `suffix` (PaliGemma) get
the last assistant turn as suffix and everything before it as prompt.

What an assistant said is found by rendering the conversation prefix by prefix, not by searching for its text.
Assumption: a longer conversation begins like a shorter one, which the code checks.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.rows.labels import Span, check_policy
from hf_dflop.rows.layout import Row
from hf_dflop.rows.template import ChatTemplate, find_template

__all__ = [
    "ImageToken",
    "Rendered",
    "Renderer",
    "audio_extractor",
    "audio_token",
    "feature_ids",
    "image_token",
    "image_token_or_none",
    "video_token",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageToken:
    """The two faces of an image (or a video, or a sound) in text."""

    placeholder: str
    """Stands for one whole image in the text that the processor gets."""
    feature: str
    """Repeated once per LLM position that holds its features, after the processor expanded the placeholder."""
    feature_id: int
    """Token id of `feature`."""


def image_token(processor: Any) -> ImageToken:
    """The placeholder and the feature token of a processor.

    Raises:
        ProcessorError: the processor has no image token.
    """
    placeholder = getattr(processor, "image_token", None)
    declared = [i for i in (getattr(processor, "image_token_ids", None) or []) if i is not None]
    main = getattr(processor, "image_token_id", None)
    # Gemma 3 calls its begin-of-image token `image_token_id`; what it declares as features is in `image_token_ids`.
    feature_id = main if main in declared or not declared else declared[0]
    if feature_id is None and placeholder in processor.tokenizer.get_vocab():
        feature_id = processor.tokenizer.convert_tokens_to_ids(placeholder)  # Janus keeps no id
    if placeholder is None or feature_id is None:
        raise ProcessorError(
            f"{type(processor).__name__} has no image token; a processor of a vision-language model whose "
            "images become part of the LLM sequence is needed"
        )
    feature = processor.tokenizer.convert_ids_to_tokens(feature_id)
    return ImageToken(placeholder=placeholder, feature=feature, feature_id=int(feature_id))


def image_token_or_none(processor: Any) -> ImageToken | None:
    """`image_token`; `None` for a processor that takes sounds and no images.

    Raises:
        ProcessorError: it takes neither.
    """
    if getattr(processor, "image_processor", None) is None and audio_token(processor) is not None:
        return None
    return image_token(processor)


def video_token(processor: Any) -> ImageToken | None:
    """The placeholder and the feature token of videos; `None` where the processor has none.

    Processors that write frames as images have a placeholder alone, which then stands for the feature too.
    """
    placeholder = getattr(processor, "video_token", None)
    if not isinstance(placeholder, str) or not callable(getattr(processor, "video_processor", None)):
        return None
    declared = [i for i in (getattr(processor, "video_token_ids", None) or []) if i is not None]
    feature_id = declared[0] if declared else processor.tokenizer.get_vocab().get(placeholder)
    if feature_id is None:
        return None
    feature = processor.tokenizer.convert_ids_to_tokens(feature_id)
    return ImageToken(placeholder=placeholder, feature=feature, feature_id=int(feature_id))


def audio_token(processor: Any) -> ImageToken | None:
    """The placeholder and the feature token of sounds; `None` where the processor takes none."""
    placeholder = getattr(processor, "audio_token", None)
    if not isinstance(placeholder, str) or audio_extractor(processor) is None:
        return None
    declared = [i for i in (getattr(processor, "audio_token_ids", None) or []) if i is not None]
    feature_id = declared[0] if declared else processor.tokenizer.get_vocab().get(placeholder)
    if feature_id is None:
        return None
    feature = processor.tokenizer.convert_ids_to_tokens(feature_id)
    return ImageToken(placeholder=placeholder, feature=feature, feature_id=int(feature_id))


def audio_extractor(processor: Any) -> Any:
    """What turns samples of sounds into features: `audio_processor`, or `feature_extractor`; `None` without one."""
    found = getattr(processor, "audio_processor", None) or getattr(processor, "feature_extractor", None)
    return found if callable(found) else None


def feature_ids(processor: Any) -> tuple[int, ...]:
    """Ids of the tokens that stand where features of images, videos and sounds are."""
    tokens = (image_token_or_none(processor), video_token(processor), audio_token(processor))
    return tuple(sorted({token.feature_id for token in tokens if token is not None}))


def _takes_suffix(processor: Any) -> bool:
    """Whether a processor takes prompt and suffix apart: it says so in its call, or in the arguments for text that it
    declares."""
    declared = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {}).get("text_kwargs")
    called = inspect.signature(type(processor).__call__).parameters
    return "suffix" in called or "suffix" in getattr(declared, "__annotations__", {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A row as text."""

    text: str
    """Text with one placeholder per image, video and sound."""
    spans: list[Span]
    """Character spans of `text` that are learned."""
    suffix: str | None = None
    """For processors that take prompt and suffix apart: the suffix."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own special tokens (not when the template wrote BOS already)."""


class Renderer:
    """Turns rows into text for one processor and label policy.

    Example:
        >>> rendered = Renderer(processor, "assistant")(row)                            # doctest: +SKIP
        >>> [rendered.text[a:b] for a, b in rendered.spans]                             # doctest: +SKIP
        ['A cat.<|im_end|>']
    """

    def __init__(self, processor: Any, labels: str = "assistant") -> None:
        check_policy(labels)
        self.processor = processor
        self.labels = labels
        self.token = image_token_or_none(processor)
        self.video_token = video_token(processor)
        self.audio_token = audio_token(processor)
        self.feature_ids = feature_ids(processor)
        self.takes_suffix = _takes_suffix(processor)
        found = find_template(processor)
        self._template = None if found is None else ChatTemplate(*found, processor.tokenizer)
        self._bos: str = getattr(processor.tokenizer, "bos_token", None) or ""
        self._takes_parts = self._template is None or self._handles_parts()
        self._header = self._generation_header() if self._template is not None else ""

    def __call__(self, row: Row) -> Rendered:
        """Render a row.

        Raises:
            DatasetError: the row has videos or sounds and the processor takes none, or the text holds a different
                number of placeholders than the row has images, videos or sounds.
            ProcessorError: the template renders turns in a way from which the assistant's part cannot be told.
        """
        if row.videos and self.video_token is None:
            raise DatasetError(
                f"{row.name}: holds a video, and {type(self.processor).__name__} takes none; leave such rows out "
                "(on_error='skip' does)"
            )
        if row.images and self.token is None:
            raise DatasetError(
                f"{row.name}: holds an image, and {type(self.processor).__name__} takes none; leave such rows out "
                "(on_error='skip' does)"
            )
        if row.audios and self.audio_token is None:
            raise DatasetError(
                f"{row.name}: holds a sound, and {type(self.processor).__name__} takes none; leave such rows out "
                "(on_error='skip' does)"
            )
        if self.takes_suffix:
            rendered = self._suffix(row)
        elif self._template is None:
            rendered = self._plain(row)
        else:
            rendered = self._templated(row)
        for kind, token, cells in (
            ("image", self.token, row.images),
            ("video", self.video_token, row.videos),
            ("audio", self.audio_token, row.audios),
        ):
            found = 0 if token is None else rendered.text.count(token.placeholder)
            # A row without videos may say what the placeholder is called; the processor then reads it as text.
            if token is not None and found != len(cells) and (kind == "image" or cells):
                raise DatasetError(
                    f"{row.name}: the rendered text has {found} placeholders {token.placeholder!r} for "
                    f"{len(cells)} {kind}s; the chat template drops {kind} parts, or the text contains the placeholder"
                )
        return rendered

    def _templated(self, row: Row) -> Rendered:
        text = self._render(row.messages)
        spans = [(0, len(text))] if self.labels == "all" else self._assistant_spans(row, text)
        has_bos = self._bos != "" and text.startswith(self._bos)
        return Rendered(text=text, spans=spans, add_special_tokens=not has_bos)

    def _assistant_spans(self, row: Row, text: str) -> list[Span]:
        spans = []
        for i, turn in enumerate(row.messages):
            if turn["role"] != "assistant":
                continue
            last = i == len(row.messages) - 1
            end = len(text) if last else self._common(self._render(row.messages[: i + 1]), text)
            if i:
                asked = self._render(row.messages[:i], add_generation_prompt=True)
                start = self._common(asked, text)
                if start < len(asked) and self._header and text.startswith(self._header, start):
                    start += len(self._header)  # the template ends a last turn in a way of its own
            else:
                header = text.find(self._header)
                start = header + len(self._header) if header >= 0 else 0
            said = [part["text"].strip() for part in turn["content"] if part["type"] == "text"]
            turn_text = text[start:end]
            if start > end or any(t[:16] not in turn_text or t[-16:] not in turn_text for t in said):
                raise ProcessorError(
                    f"{row.name}: the chat template does not render turn {i} as a continuation of the turns before "
                    "it, so the assistant's part cannot be told; use labels='all', or another chat template"
                )
            end = start + len(text[start:end].rstrip())
            if start < end:
                spans.append((start, end))
        return spans

    def _plain(self, row: Row) -> Rendered:
        eos = getattr(self.processor.tokenizer, "eos_token", None) or ""
        text, spans = "", []
        for i, turn in enumerate(row.messages):
            text += "\n" if i and text else ""
            start = len(text)
            text += self._flat(turn["content"])
            if turn["role"] == "assistant":
                text += eos
                spans.append((start, len(text)))
        return Rendered(text=text, spans=[(0, len(text))] if self.labels == "all" else spans)

    def _suffix(self, row: Row) -> Rendered:
        last = row.messages[-1] if row.messages else None
        if not row.images:
            raise DatasetError(f"{row.name}: has no image, and {type(self.processor).__name__} needs one in every row")
        if last is None or last["role"] != "assistant" or any(p["type"] != "text" for p in last["content"]):
            raise DatasetError(
                f"{row.name}: {type(self.processor).__name__} learns a suffix, so the last turn must be the "
                "assistant's and hold no image or video"
            )
        text = "\n".join(self._flat(turn["content"]) for turn in row.messages[:-1])
        return Rendered(text=text, spans=[], suffix=self._flat(last["content"]))

    def _flat(self, parts: Sequence[dict[str, Any]]) -> str:
        # A row with a video or a sound is refused before, where the processor has no token for it.
        tokens = {"image": self.token, "video": self.video_token, "audio": self.audio_token}
        media = {kind: "" if token is None else token.placeholder for kind, token in tokens.items()}
        return "".join(part["text"] if part["type"] == "text" else media[part["type"]] for part in parts)

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        assert self._template is not None
        if not self._takes_parts:
            messages = [{**turn, "content": self._flat(turn["content"])} for turn in messages]
        return self._template(messages, add_generation_prompt)

    def _handles_parts(self) -> bool:
        """Whether the template understands content parts; templates of text-only models print the list."""
        self._takes_parts = True
        try:
            text = self._render([{"role": "user", "content": [{"type": "text", "text": "dflop-probe"}]}])
        except Exception:
            return False
        return "dflop-probe" in text and "'type'" not in text and '"type"' not in text

    def _generation_header(self) -> str:
        asked = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
        try:
            before, after = self._render(asked), self._render(asked, add_generation_prompt=True)
        except Exception as error:
            raise ProcessorError(f"the chat template of {type(self.processor).__name__} fails: {error}") from error
        return after[len(before) :] if after.startswith(before) else ""

    def _common(self, one: str, text: str) -> int:
        """Where `text` stops being like `one`; never inside a special token of `text`."""
        if text.startswith(one):
            return len(one)
        end = next((i for i, (a, b) in enumerate(zip(one, text, strict=False)) if a != b), len(text))
        starts = (
            start
            for token in self.processor.tokenizer.get_added_vocab()
            for start in range(max(0, end - len(token) + 1), end)
            if text.startswith(token, start)
        )
        return min(starts, default=end)
