"""Dataset rows → a microbatch, and a check that each sample is as long as its shape columns say.

Input: rows as the dataset gives them, images decoded or not, videos not decoded. Output: the tensors of
`rows.encode`, padded on the right. A microbatch without images and videos has no pixel keys, or with `dummy_image`
those of one tiny image that nothing is learned from.

Assumptions: what a row without any label contributes to the gradient is zero times something finite, so exactly
zero. That holds for losses over label tokens, and not for what sees all positions (a router's balancing loss).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_dflop.errors import DatasetError, ProcessorError, ShapeMismatchError
from hf_dflop.rows import Layout, Renderer, Row, detect_layout, encode, read_row
from hf_dflop.rows.encode import IGNORE
from hf_dflop.rows.images import image_size
from hf_dflop.rows.videos import video_info
from hf_dflop.shapes import COLUMN_PREFIX

__all__ = ["VisionLanguageCollator"]

_DUMMY_SIDE = 28
"""Pixels; processors of a fixed resolution make it as large as every other image."""


class VisionLanguageCollator:
    """Data collator for vision-language rows; pass it to `Trainer` as `data_collator`.

    Takes the same arguments as `profile_dataset`, and makes the samples exactly as that counted them.

    Args:
        processor (`ProcessorMixin`): the model's processor.
        layout (`str` or `Callable`, defaults to `"auto"`): how rows are written; see `hf_dflop.rows.layout`.
        image_column (`str`, *optional*): column of the images.
        labels (`str`, defaults to `"assistant"`): what is learned: "assistant" turns, or "all" text.
        max_length (`int`, *optional*): samples are cut to this many tokens; a cut through an image is an error.
        pad_to_multiple_of (`int`, *optional*): pad the length of the microbatch to a multiple of it.
        dummy_image (`bool`, defaults to `False`):
            Give a microbatch without images one more row, the last: a tiny image, with labels of -100 throughout. Its
            gradient is exactly zero, and no rank leaves out the vision encoder while others wait there for it (FSDP,
            ZeRO, or DDP that does not look for unused parameters). The row is not counted among the caps of
            balancing. For training only.

    Example:
        >>> collate = VisionLanguageCollator(processor)                                 # doctest: +SKIP
        >>> collate([dataset[0], dataset[1]])["input_ids"].shape                        # doctest: +SKIP
        torch.Size([2, 391])
    """

    def __init__(
        self,
        processor: Any,
        *,
        layout: str | Callable[[dict[str, Any]], Mapping[str, Any]] = "auto",
        image_column: str | None = None,
        labels: str = "assistant",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        dummy_image: bool = False,
    ) -> None:
        self.processor = processor
        self.layout = layout
        self.image_column = image_column
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.dummy_image = dummy_image
        self.renderer = Renderer(processor, labels)
        if dummy_image and self.renderer.token is None:
            raise ProcessorError(
                f"dummy_image=True, and {type(processor).__name__} takes no images. Leave it out; under DDP, "
                "ddp_find_unused_parameters=True lets a microbatch be without a sound."
            )
        self._detected: tuple[frozenset[str], Layout] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a microbatch.

        Raises:
            DatasetError: a row is not usable; names its position in the microbatch.
            ShapeMismatchError: a sample differs from its shape columns.
        """
        return self._collate(rows, self._read(rows))

    def without_pixels(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same microbatch without decoding an image or a video: blank pictures of its size stand in for each.

        All but the pixels is as ever, and the pixels are left out. For ranks that run no encoder.
        """
        from PIL import Image

        read = []
        for row in self._read(rows):
            if row.audios:
                raise DatasetError(f"{row.name}: holds a sound, and only images are routed without pixels; use DDP")
            sizes = [image_size(cell, where=f"{row.name}, image {i}") for i, cell in enumerate(row.images)]
            read.append(
                replace(
                    row,
                    images=[Image.new("RGB", (width, height)) for height, width in sizes],
                    videos=[video_info(cell, where=f"{row.name}, video {i}") for i, cell in enumerate(row.videos)],
                )
            )
        batch = self._collate(rows, read)
        return {key: value for key, value in batch.items() if not key.startswith("pixel_")}

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        return [read_row(row, self._layout_of(row), index=position) for position, row in enumerate(rows)]

    def _collate(self, rows: Sequence[Mapping[str, Any]], read: list[Row]) -> dict[str, Any]:
        add_dummy = self.dummy_image and bool(read) and not any(row.images or row.videos for row in read)
        batch = encode(
            self.processor,
            [*read, _dummy_row()] if add_dummy else read,
            labels=self.renderer.labels,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            renderer=self.renderer,
        )
        if add_dummy:
            batch["labels"][-1] = IGNORE
        self._check(rows, batch)
        return batch

    def _layout_of(self, row: Mapping[str, Any]) -> Layout:
        columns = frozenset(row)
        if self._detected is None or self._detected[0] != columns:
            found = detect_layout(row, layout=self.layout, image_column=self.image_column)
            self._detected = (columns, found)
        return self._detected[1]

    def _check(self, rows: Sequence[Mapping[str, Any]], batch: dict[str, Any]) -> None:
        heard = self.renderer.audio_token
        ids = batch["input_ids"]
        audio_tokens = (ids == (-1 if heard is None else heard.feature_id)).sum(dim=1)
        image_tokens = sum((ids == token).sum(dim=1) for token in self.renderer.feature_ids) - audio_tokens
        found = {
            "image_tokens": image_tokens.tolist(),
            "audio_tokens": audio_tokens.tolist(),
            "text_tokens": (batch["attention_mask"].sum(dim=1) - image_tokens - audio_tokens).tolist(),
            "label_tokens": (batch["labels"][:, 1:] != -100).sum(dim=1).tolist(),
        }
        for name, counts in found.items():
            column = COLUMN_PREFIX + name
            for position, (row, count) in enumerate(zip(rows, counts, strict=False)):  # a dummy row has no columns
                if column in row and int(row[column]) != count:
                    raise ShapeMismatchError(
                        f"row {position} of the microbatch has {count} {name.replace('_', ' ')}, but its column "
                        f"{column} says {int(row[column])}: the dataset was annotated with another processor, label "
                        "policy or max_length. Profile it with this collator's own settings"
                    )


def _dummy_row() -> Row:
    from PIL import Image

    turn = {"role": "user", "content": [{"type": "image"}]}
    return Row(messages=[turn], images=[Image.new("RGB", (_DUMMY_SIDE, _DUMMY_SIDE), (128, 128, 128))])
