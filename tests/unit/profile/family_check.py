"""What is true of each family: exact at every size and length, or refused and why.

Makes the table of docs/processors.md:

python -m tests.unit.profile.family_check > docs/processors.md
"""

import functools
import re
import sys
from dataclasses import dataclass

import numpy as np
import transformers
from PIL import Image

from hf_dflop.errors import DatasetError, DflopError
from hf_dflop.profile import TokenCounter
from hf_dflop.profile.annotate import Annotator
from hf_dflop.profile.verify import measure
from hf_dflop.profile.video_count import VideoCounter
from hf_dflop.rows import Layout, Row, encode
from hf_dflop.rows.render import video_token
from hf_dflop.rows.videos import VideoInfo
from tests.unit.profile.audio_check import audio_table
from tests.unit.rows.families import NotBuilt, build, families, processor_class, quietly, templates, video_processor

SIZES = (
    *((1, 1), (1, 2), (2, 1), (1, 150), (150, 1), (1, 600), (600, 1), (3, 40), (40, 3), (8, 8), (13, 17)),
    *((28, 28), (28, 45), (55, 57), (56, 56), (57, 56), (100, 20), (20, 300), (64, 400), (400, 64), (7, 399)),
    *((180, 181), (200, 200), (224, 224), (333, 90), (90, 333), (256, 384), (384, 256), (97, 101), (480, 640)),
)
"""Heights and widths, thin strips and single pixels among them."""
CLIPS = ((64, 120, 160, 10.0), (33, 90, 50, 29.97), (40, 64, 64, 25.0), (75, 31, 200, 24.0))
"""Frames, height, width and frames per second of videos."""
HEAD = """# Which processors are counted, and how

Made by `python -m tests.unit.profile.family_check`; a test compares it with what is found. Every image-text processor
of the installed transformers ({version}) that writes something in place of an image is listed. Processors are told
apart by structure, never by name: this table is a result, not an input.

*exact* means: images, tiles, patches, image tokens, text tokens and labels equal those of really processed rows at
{num_sizes} image sizes, from 1x1 pixels to strips of 1:600, and for a row of several images where the processor takes
one. An image that the processor itself refuses is refused while counting, too. Patches are those that the encoder
computes, which need the model's config where the processor does not know the patch size.

*counted by*: the structure that was recognised (`hf_dflop/profile/tokens.py`). `processed` means that one blank image
of each size is really processed and remembered; it is exact, but as slow as the processor when all sizes differ.

*not checked* means that the processor could not be built without torchvision or without a trained tokenizer. With
torchvision, the same rules apply: an image is processed at the start, and where the counts disagree, images are
processed instead of computed.

*videos*: tiles, patches, tokens and text of {num_clips} videos of different lengths, sizes and rates equal those of
videos of noise that the processor samples and processes whole. They are counted by running the processor on frames
without pixels (`hf_dflop/rows/video_run.py`), with its own settings: whether frames are sampled, how many, and how
large. Video processors ask for torchvision; here a few functions that keep its shapes stand in for it. A dash: the
processor takes no videos, or its images are not counted. Each frame, or each group of frames that become one patch, is
a tile; that the encoder attends within it is checked on tiny models of six families (`test_videos.py`).

Video files are read by PyAV (`pip install "hf_dflop[video]"`): number of frames, rate, size and rotation from the
header, packets counted where it keeps no number. Lists of frames have no rate: processors that sample by time refuse
them, as they do in training. Processors that stack videos (LLaVA-OneVision, InternVL) take videos of one length in a
microbatch; set `num_frames`.

| model type | processor | counted by | result | videos |
|---|---|---|---|---|
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was found of one family."""

    family: str
    result: str
    """"exact", "refused", "not checked", or "wrong"."""
    structure: str = ""
    reason: str = ""
    videos: str = "-"
    """As `result`, of videos; with the reason."""


@functools.cache
def verdict(family: str) -> Verdict:
    """Build the family's processor and compare its counts with really processed rows at every size."""
    with quietly():
        return _verdict(family)


def _verdict(family: str) -> Verdict:
    try:
        processor, config = build(family)
    except NotBuilt as error:
        return Verdict(family=family, result="not checked", reason=_short(str(error)))
    for template in [processor.chat_template] if processor.chat_template else templates(processor):
        processor.chat_template = template
        try:
            counter = TokenCounter(processor, config)
            break
        except DflopError as error:
            reason = _short(str(error))
    else:
        return Verdict(family=family, result="refused", reason=reason)
    counts = Annotator(counter, Layout(kind="messages"))
    wrong = []
    for size in SIZES:
        if told := _differs(counts, [size]):
            wrong.append(f"{size[1]}x{size[0]}: {told}")
    several = _differs(counts, [(56, 90), (40, 30), (56, 56)])
    if several:
        wrong.append(f"three images: {several}")
    if len(wrong) > len(SIZES) // 3:
        # So many that the rows which are really processed when a dataset is profiled tell.
        reason = f"{len(wrong)} of {len(SIZES) + 1} rows differ ({wrong[0]}), which the check of processed rows finds"
        return Verdict(family=family, result="refused", structure=counter.structure, reason=reason)
    if wrong:
        reason = f"{len(wrong)} of {len(SIZES) + 1} rows differ, {wrong[0]}"
        return Verdict(family=family, result="wrong", structure=counter.structure, reason=reason)
    return Verdict(family=family, result="exact", structure=counter.structure, videos=_videos(family, counter))


def _videos(family: str, counter: TokenCounter) -> str:
    processor = counter.processor
    if video_token(processor) is None:
        return "-"
    if video_processor(family) is None:
        return "not checked: no video processor of its own"
    counts, wrong, counted = VideoCounter(counter), [], 0
    for frames, height, width, fps in CLIPS:
        info = VideoInfo(num_frames=frames, height=height, width=width, fps=fps)
        name = f"{frames} frames of {width}x{height}"
        try:
            found = counts.count([info])[0]
        except DflopError as error:
            wrong.append(f"{name}: {error}")
            continue
        counted += 1
        noise = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        batch = processor(
            text=[processor.video_token],
            videos=[noise],
            videos_kwargs={"video_metadata": [info.metadata()], "return_metadata": True, "return_tensors": "pt"},
            return_text_replacement_offsets=True,
        )
        real = counter.tiles_of(batch)
        text = batch["text_replacement_offsets"][0][0]["replacement"]
        tokens = int(np.isin(np.asarray(batch["input_ids"]), counter.feature_ids).sum())
        same = (found.tiles, found.patches, found.patches_sq, found.image_tokens, found.replacement)
        if same != (len(real), sum(real), sum(patches**2 for patches in real), tokens, text):
            return f"wrong: {name}: {same[:4]} for {(len(real), sum(real), tokens)}"
    if not counted:
        return "refused: " + _short(wrong[0])
    return "exact" if not wrong else f"exact; refused: {_short(wrong[0])}"


def _differs(counts: Annotator, sizes: list[tuple[int, int]]) -> str | None:
    """Where the counts of a row with images of these sizes differ from the processor's."""
    parts = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "What is in the image?\n"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "a cat.\n\n"}]}
    images = [
        Image.fromarray(np.random.default_rng(h * w).integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes
    ]
    row = Row(messages=[{"role": "user", "content": parts}, said], images=images)
    try:
        counted = counts.count([row])[0]
    except DatasetError:
        counted = None
    try:
        batch = encode(counts.counter.processor, [row], labels=counts.renderer.labels)
    except DatasetError as error:
        return None if counted is None else f"the processor refuses it ({error}), and it was counted"
    if counted is None:
        return "it was refused, and the processor takes it"
    real = measure(batch, counts.counter) | {"num_images": len(sizes)}
    return next((f"{k} {counted[k]} for {real[k]}" for k in real if counted[k] != real[k]), None)


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    text = re.sub(
        r"^\w+ cannot be counted, neither from the sizes of images nor by processing blank ones: it ", "", text
    )
    return text if len(text) <= 180 else text[:177] + "..."


def table() -> str:
    """The page."""
    lines = []
    for family in sorted(families()):
        found = verdict(family)
        result = found.result + (f": {found.reason}" if found.reason else "")
        lines.append(f"| {family} | {processor_class(family)} | {found.structure} | {result} | {found.videos} |\n")
    head = HEAD.format(version=transformers.__version__, num_sizes=len(SIZES), num_clips=len(CLIPS))
    return head + "".join(lines) + audio_table()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.stdout.write(table())
