"""Rows → the batch of tensors that the model gets, by really running the processor.

The one place where samples become tensors. Rows with and without images, videos or sounds go through the processor
apart, since processors differ in how they take a batch where only some rows have images; the two halves are joined by
right padding, in the order of the rows. Of a video, the frames that the processor samples are decoded and no others.

Output: the processor's own keys (`input_ids`, `attention_mask`, `pixel_values`, ...) and `labels`, -100 where
nothing is learned. Without an image or a video in any row, there are no pixel keys, and without a sound no audio keys.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.rows.audio import load_audio
from hf_dflop.rows.images import load_image
from hf_dflop.rows.labels import holes_of, labelled, shift_spans
from hf_dflop.rows.layout import Row
from hf_dflop.rows.render import Rendered, Renderer, audio_extractor
from hf_dflop.rows.video_run import run_without_pixels
from hf_dflop.rows.videos import load_frames, video_info

__all__ = ["IGNORE", "encode"]

IGNORE = -100
"""Label of a position that is not learned."""


def encode(
    processor: Any,
    rows: Sequence[Row],
    *,
    labels: str = "assistant",
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    renderer: Renderer | None = None,
) -> dict[str, Any]:
    """Run the processor on rows.

    Args:
        processor (`ProcessorMixin`): a processor of a vision-language model.
        rows (`Sequence[Row]`): samples; their images and videos are decoded here where they are not yet.
        labels (`str`, defaults to `"assistant"`): "assistant" or "all".
        max_length (`int`, *optional*): cut longer samples to this many tokens; images are never cut.
        pad_to_multiple_of (`int`, *optional*): pad the length of the batch to a multiple of it.
        renderer (`Renderer`, *optional*): a renderer of the same processor and policy to use again.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `labels` and other text keys of shape `(num_rows, length)`, and the
        image and video keys of the processor.

    Raises:
        DatasetError: a row cannot be processed, or `max_length` would cut an image, a video or a sound.
    """
    if not rows:
        raise DatasetError("there are no rows to encode")
    if processor.tokenizer.pad_token is None:
        raise ProcessorError("the tokenizer has no pad token; set processor.tokenizer.pad_token (for example to EOS)")
    renderer = renderer or Renderer(processor, labels)
    rendered = [renderer(row) for row in rows]
    text_columns: list[dict[str, np.ndarray]] = [{} for _ in rows]
    image_columns: dict[str, Any] = {}
    for with_pixels in (True, False):
        picked = [i for i, row in enumerate(rows) if bool(row.images or row.videos or row.audios) is with_pixels]
        if not picked:
            continue
        chosen, texts = [rows[i] for i in picked], [rendered[i] for i in picked]
        output = _process(processor, chosen, texts, max_length)
        for i, columns in zip(picked, _text_columns(output, texts, renderer), strict=True):
            text_columns[i] = columns
        if with_pixels:
            image_columns = output
    return {**_pad(text_columns, processor.tokenizer.pad_token_id, pad_to_multiple_of), **_tensors(image_columns)}


def _process(processor: Any, rows: Sequence[Row], texts: Sequence[Rendered], max_length: int | None) -> dict[str, Any]:
    """The processor's output as a dict; text keys are lists."""
    if len({text.add_special_tokens for text in texts}) > 1:
        raise DatasetError("the chat template writes BOS for some rows of the batch and not for others")
    suffixes = [text.suffix for text in texts if text.suffix is not None]
    text_kwargs: dict[str, Any] = {
        "return_tensors": None,
        "padding": True,
        "padding_side": "right",
        "add_special_tokens": texts[0].add_special_tokens,
        "truncation": False,
    }
    if max_length is not None and not suffixes:
        text_kwargs |= {"truncation": True, "max_length": max_length}
    kwargs: dict[str, Any] = {"text_kwargs": text_kwargs, "text": [text.text for text in texts]}
    if suffixes:
        kwargs["suffix"] = suffixes
    else:
        text_kwargs["return_offsets_mapping"] = True
        kwargs["return_text_replacement_offsets"] = True
    if pictures := [_pictures(processor, row) for row in rows if row.images]:
        kwargs["images"] = pictures
        kwargs["images_kwargs"] = {"return_tensors": "pt"}
    if clips := [clip for row in rows for clip in _clips(processor, row)]:
        kwargs["videos"] = [frames for frames, _ in clips]
        kwargs["videos_kwargs"] = {
            "video_metadata": [metadata for _, metadata in clips],
            "do_sample_frames": False,
            "return_metadata": True,  # some write timestamps only with it
            "return_tensors": "pt",
        }
    if sounds := [sound for row in rows for sound in _sounds(processor, row)]:
        kwargs["audio"] = sounds
        rate = audio_extractor(processor).sampling_rate
        kwargs["audio_kwargs"] = {"sampling_rate": rate, "return_tensors": "pt"}
    try:
        output = dict(processor(**kwargs))
    except Exception as error:
        if len(rows) > 1:
            for row, text in zip(rows, texts, strict=True):
                _process(processor, [row], [text], max_length)
        cut = "count between text" in str(error)
        hint = "; max_length would cut an image, a video or a sound: raise it" if cut else ""
        raise DatasetError(f"{rows[0].name}: {type(processor).__name__} failed: {error}{hint}") from error
    output.pop("video_metadata", None)
    if suffixes and max_length is not None:
        for row, mask in zip(rows, output["attention_mask"], strict=True):
            if sum(mask) > max_length:
                raise DatasetError(
                    f"{row.name}: {sum(mask)} tokens, more than max_length={max_length}; prompt and suffix are not "
                    "cut, so drop the row or raise max_length"
                )
    return output


def _pictures(processor: Any, row: Row) -> list[Any]:
    keeps_mode = bool(getattr(processor.image_processor, "do_convert_rgb", False))
    pictures = [load_image(cell, where=f"{row.name}, image {i}") for i, cell in enumerate(row.images)]
    return [p if keeps_mode or p.mode == "RGB" else p.convert("RGB") for p in pictures]


def _clips(processor: Any, row: Row) -> list[tuple[Any, dict[str, Any]]]:
    """The sampled frames of each video of a row, `(num_frames, height, width, 3)`, and what is known of it."""
    clips = []
    for i, cell in enumerate(row.videos):
        where = f"{row.name}, video {i}"
        info = video_info(cell, where=where)
        indices = run_without_pixels(processor, info).indices
        clips.append((load_frames(cell, info, indices, where=where), info.metadata(indices)))
    return clips


def _sounds(processor: Any, row: Row) -> list[np.ndarray]:
    """The samples of each sound of a row, `(num_samples,)`, at the rate that the processor asks for."""
    return [
        load_audio(cell, int(audio_extractor(processor).sampling_rate), where=f"{row.name}, sound {i}")
        for i, cell in enumerate(row.audios)
    ]


def _text_columns(
    output: dict[str, Any], texts: Sequence[Rendered], renderer: Renderer
) -> list[dict[str, np.ndarray]]:
    """Take the text keys out of the output; per row, arrays without padding, labels among them."""
    input_ids = output["input_ids"]
    replaced = output.pop("text_replacement_offsets", None)
    replaced = [[] for _ in texts] if replaced is None or not len(replaced) else replaced
    offsets = output.pop("offset_mapping", None)
    suffix_labels = output.pop("labels", None)
    # A mask of features may have the shape of the text by chance.
    keys = [k for k, v in output.items() if _is_text_key(v, input_ids) and "feature" not in k and "audio" not in k]
    taken = {key: np.asarray(output.pop(key)) for key in keys}  # some give tensors whatever is asked
    rows = []
    for i, text in enumerate(texts):
        length = int(np.sum(taken["attention_mask"][i]))
        columns = {key: np.asarray(value[i], dtype=np.int64)[:length] for key, value in taken.items()}
        ids = columns["input_ids"]
        if text.suffix is not None:
            learned = np.asarray(suffix_labels[i])[:length] != IGNORE
            if renderer.labels == "all":
                learned = np.ones(length, dtype=bool)
        else:
            spans = shift_spans(text.spans, holes_of(replaced[i]))
            where = np.asarray(offsets[i], dtype=np.int64).reshape(-1, 2)[:length]
            learned = labelled(where, spans, renderer.labels)
        learned &= ~np.isin(ids, renderer.feature_ids)
        columns["labels"] = np.where(learned, ids, IGNORE)
        rows.append(columns)
    return rows


def _is_text_key(value: Any, input_ids: Sequence[Sequence[int]]) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == len(input_ids) and isinstance(value[0], list) and len(value[0]) == len(input_ids[0])
    return getattr(value, "ndim", 0) == 2 and tuple(value.shape) == (len(input_ids), len(input_ids[0]))


def _pad(rows: Sequence[dict[str, np.ndarray]], pad_id: int, multiple: int | None) -> dict[str, Any]:
    import torch

    length = max(len(row["input_ids"]) for row in rows)
    if multiple:
        length = -(-length // multiple) * multiple
    fill = {"input_ids": pad_id, "labels": IGNORE}
    batch = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        padded = np.full((len(rows), length), fill.get(key, 0), dtype=np.int64)
        for i, row in enumerate(rows):
            if key in row:
                padded[i, : len(row[key])] = row[key]
        batch[key] = torch.from_numpy(padded)
    return batch


def _tensors(columns: dict[str, Any]) -> dict[str, Any]:
    import torch

    tensors = {}
    for key, value in columns.items():
        if not isinstance(value, torch.Tensor):
            value = torch.as_tensor(np.asarray(value)) if not _holds_tensors(value) else torch.stack(list(value))
        tensors[key] = value
    return tensors


def _holds_tensors(value: Any) -> bool:
    import torch

    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], torch.Tensor)
