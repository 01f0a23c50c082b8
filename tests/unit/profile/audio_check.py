"""What is true of the sounds of each family: exact at every length, or refused and why. Part of docs/processors.md."""

import functools
from typing import Any

import numpy as np
from PIL import Image

from hf_dflop.errors import DatasetError, DflopError
from hf_dflop.profile import TokenCounter
from hf_dflop.profile.annotate import Annotator
from hf_dflop.profile.verify import measure
from hf_dflop.rows import Layout, Row, encode
from tests.unit.rows.audio_families import audio_families, build_audio
from tests.unit.rows.families import NotBuilt, processor_class, quietly

LENGTHS = (
    *(1, 100, 400, 401, 640, 641, 1600, 1601, 8000, 15_999, 16_000, 16_001, 24_321, 47_999, 48_000, 100_000),
    *(479_999, 480_000, 480_001, 600_000),
)
"""Samples of one sound, around the borders of frames and of a chunk of 30 seconds at 16 kHz."""
HEAD = """
## Sounds

Every processor that writes something in place of a sound. *exact* means: chunks and frames of the audio encoder, audio
tokens, text tokens and labels equal those of really processed noise at {num_lengths} lengths, from one sample to
beyond 30 seconds, for two sounds in a row where the processor takes them, for a row without a sound, and for a row
with an image and a sound where it takes both. They are counted by running the processor on silence of the length
(`hf_dflop/profile/audio_count.py`). A sound for which the processor writes no token is refused as too short.

Files are read by PyAV (`pip install "hf_dflop[audio]"`), packet by packet and without decoding: WAV, FLAC, MP3, Ogg;
also as members of tar archives (WebDataset: `a.wav` beside `a.txt`; beside `a.json`, pass `layout=` a function).

Models of sounds and text, or of images, sounds and text, train under `DflopCallback` with the steps of the stock run.
The audio encoder is balanced as the vision encoder is, with frames where that has patches. Its cost is known where it
is of Whisper's structure (Qwen2-Audio, Qwen2.5-Omni, Audio Flamingo 3, Voxtral, GLM-ASR): FLOPs are within 1 % of
torch's counter. For another one, give `cost_model=CostModel.analytic(spec)` with a `ModelSpec` of the nearest
dimensions: what is trained does not depend on it. `PackedCollator` joins rows with sounds where positions count
tokens. Refused are:

- a model whose loss is the mean of a microbatch, whatever Trainer tells it (Qwen2-Audio): its gradient depends on the
  grouping. Give the Trainer a `compute_loss_func` that divides by `num_items_in_batch`.
- packed rows with sounds where positions have several dimensions (Qwen2.5-Omni): those of sounds are not known here.
- `dummy_image=True` with sounds, since no dummy sound is made. Where ranks wait for each other in the encoder, every
  step needs as many samples with sounds as microbatches, or DDP `ddp_find_unused_parameters=True`.
- `hf-dflop plan`, `simulate`, `measure`, and pipelines: they place and run images and videos alone.

| model type | processor | sounds |
|---|---|---|
"""


def row_of(lengths: list[int], rate: int, sizes: list[tuple[int, int]] | None = None) -> Row:
    """A row with sounds of noise, and blank images."""
    rng = np.random.default_rng(0)
    kinds = ["image"] * len(sizes or ()) + ["audio"] * len(lengths)
    parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": "What is in the image?\n"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "a cat."}]}
    sounds = [{"array": rng.normal(size=n).astype(np.float32), "sampling_rate": rate} for n in lengths]
    images = [Image.new("RGB", (width, height)) for height, width in sizes or ()]
    return Row(messages=[{"role": "user", "content": parts}, said], images=images, audios=sounds)


def differs(counts: Annotator, row: Row) -> str | None:
    """Where the counts of a row differ from the processor's."""
    try:
        counted = counts.count([row])[0]
    except DatasetError as error:
        counted, reason = None, str(error)
    try:
        real = measure(encode(counts.counter.processor, [row], labels=counts.renderer.labels), counts.counter)
    except DatasetError as error:
        return None if counted is None else f"the processor refuses it ({error}), and it was counted"
    if counted is None:
        # A placeholder for which nothing is written leaves the encoder without a place for its features.
        return None if row.audios and not real["audio_tokens"] else f"the processor takes it, and {reason}"
    return next((f"{k} {counted[k]} for {real[k]}" for k in real if counted[k] != real[k]), None)


@functools.cache
def audio_verdict(family: str) -> str:
    """ "exact", or "refused" or "not checked" with the reason, or "wrong"."""
    with quietly():
        return _verdict(family)


def _verdict(family: str) -> str:
    try:
        processor, config = build_audio(family)
    except NotBuilt as error:
        return f"not checked: {_short(error)}"
    try:
        counter = TokenCounter(processor, config)
        counts = Annotator(counter, Layout(kind="messages"))
        if counter.audio is None:
            return "refused: it takes no sounds"
        rate = counter.audio.sampling_rate
        counts.count([row_of([rate], rate)])
    except DflopError as error:
        return f"refused: {_short(error)}"
    rows: dict[Any, Row] = {length: row_of([length], rate) for length in LENGTHS}
    rows["two sounds"] = row_of([9_000, 30_001], rate)
    if _takes_text_alone(processor):
        rows["no sound"] = row_of([], rate)
    if counter.token is not None:
        rows["an image and a sound"] = row_of([20_000], rate, [(56, 90)])
    for name, row in rows.items():
        if told := differs(counts, row):
            return f"wrong: {name}: {told}"
    return "exact"


def _takes_text_alone(processor: Any) -> bool:
    try:
        processor(text=["x"])
    except Exception:
        return False
    return True


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "\\|").removeprefix("the row: ")
    return text if len(text) <= 160 else text[:157] + "..."


def audio_table() -> str:
    """The part of the page."""
    families = sorted(audio_families())
    lines = [f"| {family} | {processor_class(family)} | {audio_verdict(family)} |\n" for family in families]
    return HEAD.format(num_lengths=len(LENGTHS)) + "".join(lines)
