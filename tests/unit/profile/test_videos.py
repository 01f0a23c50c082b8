"""Videos: annotated from lengths and sizes, as what the processor and the model make of them."""

import functools
import inspect
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from hf_dflop.data import VisionLanguageCollator
from hf_dflop.errors import DatasetError, ShapeMismatchError
from hf_dflop.profile import TokenCounter, profile_dataset
from hf_dflop.profile import video_count as module
from hf_dflop.profile.annotate import Annotator
from hf_dflop.profile.video_count import VideoCounter
from hf_dflop.rows import Layout, Row, encode
from hf_dflop.rows.videos import VideoInfo
from hf_dflop.shapes import Shapes
from tests.unit.rows import tiny
from tests.unit.rows.families import NotBuilt, build

TEMPLATE = tiny.CHATML.replace("IMAGE{% else", "IMAGE{% elif c['type'] == 'video' %}VIDEO{% else")
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 2000}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
TOWER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@functools.cache
def processor(family: str) -> Any:
    built, _ = build(family)
    around = [m if m in built.tokenizer.get_vocab() else "" for m in ("<|begin_of_video|>", "<|end_of_video|>")]
    marks = {"IMAGE": built.image_token, "VIDEO": built.video_token.join(around)}
    built.chat_template = functools.reduce(lambda text, mark: text.replace(*mark), marks.items(), TEMPLATE)
    return built


def frames(number: int, width: int = 60, height: int = 40, seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in noise]


def clip_row(*clips: Any, images: Any = (), question: str = "What happens?") -> Row:
    parts = [{"type": "video"} for _ in clips] + [{"type": "image"} for _ in images]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return Row(
        messages=[asked, {"role": "assistant", "content": [{"type": "text", "text": "The sea."}]}],
        images=list(images),
        videos=list(clips),
    )


SAMPLINGS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_vl", {"do_sample_frames": True, "fps": 2}),
    ("qwen2_vl", {"do_sample_frames": True, "num_frames": 6}),
    ("qwen2_vl", {"cap_pixels_per_frame": True, "max_video_tokens": 40}),
    ("qwen3_vl", {"do_sample_frames": True, "num_frames": None, "fps": 5}),
    ("qwen3_vl", {"do_sample_frames": False}),
    ("glm4v", {"do_sample_frames": True, "fps": 3, "max_duration": 2}),
    ("llava_onevision", {"do_sample_frames": True, "num_frames": 8}),
    ("llava_next_video", {"do_sample_frames": True, "fps": 1}),
    ("internvl", {"do_sample_frames": True, "num_frames": 5}),
    ("smolvlm", {"do_sample_frames": True, "num_frames": 7, "fps": 2}),
]


@pytest.mark.parametrize(("family", "settings"), SAMPLINGS)
def test_sampling_is_the_processors_own(
    family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from numbers alone, against the processor sampling all frames."""
    stock = processor(family)
    for name, value in settings.items():
        monkeypatch.setattr(stock.video_processor, name, value, raising=False)
    counter = TokenCounter(stock, tiny.CONFIG)
    seen = set()
    for number, height, width, fps in ((9, 40, 60, 8.0), (37, 90, 31, 12.5), (64, 64, 64, 29.97), (16, 20, 100, 4.0)):
        info = VideoInfo(num_frames=number, height=height, width=width, fps=fps)
        noise = np.random.default_rng(number).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
        kwargs = {"video_metadata": [info.metadata()], "return_metadata": True, "return_tensors": "pt"}
        try:
            batch = stock(
                text=[stock.video_token], videos=[noise], videos_kwargs=kwargs, return_text_replacement_offsets=True
            )
        except (ValueError, RuntimeError) as error:  # so with older versions of some
            pytest.skip(f"the processor of this transformers takes the frames of one video for videos: {error}")
        found = VideoCounter(counter).count([info])[0]
        assert found.replacement == batch["text_replacement_offsets"][0][0]["replacement"]
        tiles = counter.tiles_of(batch)
        assert (found.tiles, found.patches) == (len(tiles), sum(tiles))
        assert found.patches_sq == sum(patches**2 for patches in tiles)
        seen.add((found.tiles, found.image_tokens))
    assert len(seen) > 1 or "num_frames" in settings


def test_a_video_that_cannot_be_sampled_names_its_length() -> None:
    try:
        stock = processor("gemma4")
    except NotBuilt as error:
        pytest.skip(f"this transformers cannot build the processor: {error}")
    info = VideoInfo(num_frames=5, height=40, width=60, fps=10.0)
    with pytest.raises(DatasetError, match=r"refuses a video of 5 frames of 60x40 pixels: .*num_frames=32"):
        VideoCounter(TokenCounter(stock, build("gemma4")[1])).count([info])


def dataset() -> datasets.Dataset:
    cells = [
        {"videos": [frames(6)], "messages": "<video>What happens?"},
        {"videos": [frames(9, 90, 30), frames(4, 30, 80)], "messages": "<video>First.\n<video>Second?"},
        {"videos": [], "messages": "Only text?"},
        {"videos": [frames(5, 64, 64)], "messages": "No marker?"},
    ]
    said = {"role": "assistant", "content": "The sea, then the sea."}
    rows = [{**cell, "messages": [{"role": "user", "content": cell["messages"]}, said]} for cell in cells]
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"videos": datasets.List(datasets.List(datasets.Image())), "messages": [turn]})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava_onevision", "internvl", "glm4v"])
def test_a_dataset_of_videos_is_annotated_and_collated(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is really processed and compared, by the profile and again by the collator."""
    stock = processor(family)
    if family in ("llava_onevision", "internvl"):  # their processors stack videos, which must be of one length
        monkeypatch.setattr(stock.video_processor, "do_sample_frames", True)
        monkeypatch.setattr(stock.video_processor, "num_frames", 3)
    if family == "glm4v":  # it samples by time, of which lists of frames know nothing
        with pytest.raises(DatasetError, match=r"row 0, column 'videos': .* refuses a video of 6 frames"):
            profile_dataset(dataset(), stock, verify=0)
        monkeypatch.setattr(stock.video_processor, "do_sample_frames", False)
    annotated, profile = profile_dataset(dataset(), stock, config=tiny.CONFIG, verify=4)
    shapes = Shapes.of_dataset(annotated)
    assert shapes.num_images.tolist() == [1, 2, 0, 1]
    assert (shapes.image_tiles > 0).tolist() == [True, True, False, True]
    assert (shapes.image_tokens > 0).tolist() == [True, True, False, True]
    collate = VisionLanguageCollator(stock)
    batch = collate([annotated[0], annotated[2]])
    assert any("pixel" in key for key in batch)
    assert not any("pixel" in key for key in collate([annotated[2]]))
    wrong = {**annotated[0], "dflop_image_tokens": annotated[0]["dflop_image_tokens"] + 1}
    with pytest.raises(ShapeMismatchError, match="image tokens"):
        collate([wrong])
    assert profile.totals["image_tokens"] == shapes.image_tokens.sum()


def test_a_count_that_is_wrong_stops_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.run_without_pixels

    def shorter(processor: Any, info: VideoInfo) -> Any:
        return real(processor, VideoInfo(num_frames=info.num_frames // 2, height=info.height, width=info.width))

    monkeypatch.setattr(module, "run_without_pixels", shorter)
    with pytest.raises(ShapeMismatchError, match="the processor gives"):
        profile_dataset(dataset(), processor("qwen2_vl"), verify=4)


def test_images_and_videos_in_one_row_and_one_batch() -> None:
    stock = processor("qwen2_vl")
    counts = Annotator(TokenCounter(stock), Layout(kind="messages"))
    rows = [
        clip_row(frames(6), images=frames(2, 50, 70)[:1]),
        clip_row(images=frames(3, 80, 60)[:2]),
        clip_row(frames(4), frames(8, 30, 90)),
        clip_row(question="Only text?"),
    ]
    counted = counts.count(rows)
    batch = encode(stock, rows)
    found = np.isin(batch["input_ids"].numpy(), counts.renderer.feature_ids).sum(axis=1)
    assert found.tolist() == [row["image_tokens"] for row in counted]
    assert (batch["attention_mask"].sum(dim=1).numpy() - found).tolist() == [row["text_tokens"] for row in counted]
    assert len(counts.counter.tiles_of(batch)) == sum(row["image_tiles"] for row in counted)
    assert not np.isin(batch["labels"].numpy(), counts.renderer.feature_ids).any()


def test_a_cut_through_a_video_is_refused() -> None:
    stock = processor("qwen2_vl")
    counts = Annotator(TokenCounter(stock), Layout(kind="messages"), max_length=20)
    with pytest.raises(DatasetError, match="images, videos and sounds cannot be cut"):
        counts.count([clip_row(frames(8))])


def test_bad_videos_are_marked_and_the_others_counted(tmp_path: Path) -> None:
    rows = [
        {"video": str(tmp_path / "missing.mp4"), "question": "q", "answer": "a"},
        {"video": None, "question": "q", "answer": "a"},
    ]
    with pytest.raises(DatasetError, match=r"row 0, column 'video', video 0"):
        profile_dataset(datasets.Dataset.from_list(rows), processor("qwen2_vl"), verify=0)
    annotated, profile = profile_dataset(
        datasets.Dataset.from_list(rows), processor("qwen2_vl"), verify=0, on_error="mark"
    )
    assert [error.index for error in profile.errors] == [0]
    assert annotated["dflop_text_tokens"][0] == 0
    assert annotated["dflop_text_tokens"][1] > 0


QWEN = {"depth": 2, "num_heads": 4, "in_channels": 3}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLConfig", QWEN | {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}, TEXT | MROPE, {}),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        QWEN | {"hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 56,
                "fullatt_block_indexes": [1]},
        TEXT | MROPE, {},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        QWEN | {"hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 64, "deepstack_visual_indexes": [0],
                "num_position_embeddings": 64},
        TEXT | MROPE | {"head_dim": 16}, {},
    ),
    "glm4v": (
        "Glm4vConfig",
        QWEN | {"hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 64, "image_size": 56},
        TEXT | {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}, {},
    ),
    "llava_onevision": (
        "LlavaOnevisionConfig",
        TOWER | {"model_type": "siglip_vision_model", "image_size": 96, "patch_size": 14, "vision_use_head": False},
        TEXT | {"model_type": "qwen2"}, {"num_image_tokens": 36},
    ),
    "internvl": (
        "InternVLConfig", TOWER | {"image_size": [96, 96], "patch_size": [14, 14]}, TEXT | {"model_type": "qwen2"},
        {"image_seq_length": 9},
    ),
}  # fmt: skip
"""Config, vision settings, text settings, and what the processor must be told to match."""


@pytest.mark.parametrize("family", MODELS)
def test_the_model_takes_as_many_features_and_attends_within_a_tile(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers refuses a forward pass whose placeholders and features differ in number."""
    name, vision, text, told = MODELS[family]
    stock = processor(family)
    for key, value in told.items():
        monkeypatch.setattr(stock, key, value)
    ids = {key: stock.tokenizer.convert_tokens_to_ids(getattr(stock, key)) for key in ("image_token", "video_token")}
    if getattr(stock.image_processor, "merge_size", None):
        vision = vision | {"patch_size": stock.video_processor.patch_size}
    config = getattr(tf, name)(
        vision_config=vision, text_config=text, **{f"{key}_id": value for key, value in ids.items()}
    )
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    monkeypatch.setattr(stock.video_processor, "do_sample_frames", False)
    counts = Annotator(TokenCounter(stock, config), Layout(kind="messages"))
    row = clip_row(frames(8))
    counted = counts.count([row])[0]
    batch = {k: v.double() if v.is_floating_point() else v for k, v in encode(stock, [row]).items()}
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
        pixels = "pixel_values_videos" if "pixel_values_videos" in batch else "pixel_values"
        held = features(model, batch)
        # LLaVA-OneVision ends with a line break, which the forward of an older transformers adds.
        added = "image_newline" in inspect.getsource(inspect.unwrap(type(model.model).forward))
        assert len(held) + added == counted["image_tokens"]
        changed = batch[pixels].clone().reshape(counted["image_tiles"], -1)
        changed[-1] += 1.0  # the last tile alone
        moved = (features(model, {**batch, pixels: changed.reshape(batch[pixels].shape)}) - held).abs().amax(dim=1) > 0
    per_tile = len(held) // counted["image_tiles"]
    last = (counted["image_tiles"] - 1) * per_tile  # LLaVA-OneVision ends with a line break
    assert moved[last : last + per_tile].any()
    assert not moved[:last].any()
    fewer = batch["input_ids"].clone()
    is_feature = torch.isin(fewer, torch.tensor(counts.renderer.feature_ids))
    fewer[0, int(is_feature[0].nonzero()[0])] = 5
    with pytest.raises((ValueError, RuntimeError, IndexError)), torch.no_grad():
        model(**{**batch, "input_ids": fewer})


def features(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the vision side gives the LLM for the videos, `(num_features, width)`."""
    given = {k: v for k, v in batch.items() if k.startswith("pixel_values") or k == "video_grid_thw"}
    inner = model.model
    pixels = given.pop(next(k for k in given if k.startswith("pixel_values")))  # by place: its name has changed
    if "video_grid_thw" in given or "llava" in type(model).__name__.lower():
        output = inner.get_video_features(pixels, **given)
    else:
        output = inner.get_image_features(pixels, **given)
    output = getattr(output, "pooler_output", output)
    output = torch.cat(list(output)) if isinstance(output, list | tuple) else output
    return output.reshape(-1, output.shape[-1])
