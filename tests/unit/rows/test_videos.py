"""Video cells: what the header says, and that decoding agrees."""

import importlib.util
import io
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hf_dflop.errors import DatasetError
from hf_dflop.rows import detect_layout, read_row
from hf_dflop.rows.videos import VideoInfo, load_frames, video_cells, video_info

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is an optional extra")
SAID = [{"role": "assistant", "content": "The sea."}]


def container(ending: str = "mp4", frames: int = 13, rotation: int = 0) -> bytes:
    """A video of 64 x 48 pixels at 10 frames per second, whose left half is bright."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(ending, ending)) as out:
        stream = out.add_stream("mpeg2video" if ending == "ts" else "mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            picture = np.random.default_rng(i).integers(0, 40, (48, 64, 3), dtype=np.uint8)
            picture[:, :32] += 200
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file.getvalue()


def faststart(folder: Path) -> bytes:
    """An MP4 whose header is at the beginning."""
    import av

    (folder / "header_last.mp4").write_bytes(container())
    options = {"movflags": "faststart"}
    with av.open(folder / "header_last.mp4") as source, av.open(folder / "clip.mp4", "w", options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return (folder / "clip.mp4").read_bytes()


@needs_av
@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts"])
def test_a_header_tells_what_decoding_finds(ending: str, tmp_path: Path) -> None:
    encoded = container(ending)
    path = tmp_path / f"clip.{ending}"
    path.write_bytes(encoded)
    decoder = SimpleNamespace(_hf_encoded={"bytes": encoded, "path": None})
    cells: list[Any] = [str(path), {"bytes": encoded, "path": None}, {"bytes": None, "path": str(path)}, decoder]
    for cell in [*cells, {"bytes": pa.py_buffer(encoded), "path": None}]:
        info = video_info(cell)
        assert info == VideoInfo(num_frames=13, height=48, width=64, fps=10.0)
        assert load_frames(cell, info, range(13)).shape == (13, 48, 64, 3)


@needs_av
@pytest.mark.parametrize(("rotation", "bright"), [(90, "bottom"), (-90, "top"), (180, "right")])
def test_frames_are_upright(rotation: int, bright: str) -> None:
    cell = {"bytes": container(rotation=rotation), "path": None}
    info = video_info(cell)
    assert (info.width, info.height) == ((64, 48) if rotation == 180 else (48, 64))
    frame = load_frames(cell, info, [3])[0].astype(float)
    height, width = frame.shape[:2]
    halves = {
        "top": frame[: height // 2], "bottom": frame[height // 2 :], "right": frame[:, width // 2 :],
    }  # fmt: skip
    assert halves[bright].mean() > 150


@needs_av
def test_frames_come_in_the_order_asked_for_and_twice_if_asked() -> None:
    cell = {"bytes": container(), "path": None}
    info = video_info(cell)
    every = load_frames(cell, info, range(13))
    assert np.array_equal(load_frames(cell, info, [7, 2, 2]), every[[7, 2, 2]])


@needs_av
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(4000))
    cases: list[tuple[Any, str]] = [
        ("/nowhere/at/all.mp4", "row 3: the video cannot be read"),
        ({"bytes": b"garbage", "path": None}, "row 3: the video cannot be read"),
        ({"bytes": sound.getvalue(), "path": None}, "row 3: the file holds no video stream"),
        ("https://somewhere/clip.mp4", "is a URL"),
        (7, "row 3: int is not a video"),
        ([], "frames of 0 sizes"),
    ]
    for cell, message in cases:
        with pytest.raises(DatasetError, match=message):
            video_info(cell, where="row 3")
    moved = faststart(tmp_path)
    assert video_info({"bytes": moved, "path": None}).num_frames == 13
    with pytest.raises(DatasetError, match="row 3: the file ends before its last frame"):
        video_info({"bytes": moved[:-200], "path": None}, where="row 3")
    cell = {"bytes": container(), "path": None}
    longer = VideoInfo(num_frames=20, height=48, width=64, fps=10.0)
    with pytest.raises(DatasetError, match="tells of 20 frames, but frame 19 is not there"):
        load_frames(cell, longer, [0, 19])
    sideways = VideoInfo(num_frames=13, height=64, width=48, fps=10.0, rotation=90)
    with pytest.raises(DatasetError, match="rotated otherwise"):
        load_frames(cell, sideways, [0])


def test_files_ask_for_a_reader_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DatasetError, match=r'row 3: reading a video file needs PyAV: pip install "hf_dflop\[video\]"'):
        video_info("clip.mp4", where="row 3")


def test_lists_of_frames() -> None:
    frames = [Image.new("L", (30, 20), i) for i in range(4)]
    info = video_info(frames)
    assert info == VideoInfo(num_frames=4, height=20, width=30)
    assert load_frames(frames, info, [3, 0])[:, 0, 0].tolist() == [[3, 3, 3], [0, 0, 0]]
    with pytest.raises(DatasetError, match="frames of 2 sizes"):
        video_info([*frames, Image.new("L", (31, 20))])


def test_one_video_several_videos_and_frames_are_told_apart() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    frame, clip = {"bytes": file.getvalue(), "path": None}, {"bytes": b"x", "path": None}
    picture = Image.new("RGB", (4, 4))
    assert video_cells(None) == video_cells([]) == video_cells([None, []]) == []
    assert video_cells(clip) == [clip]
    assert video_cells([clip, "b.mp4"]) == [clip, "b.mp4"]
    for frames in ([frame, frame], ["1.png", "2.png"], [picture]):
        assert video_cells(frames) == [frames]
        assert video_cells([frames, frames]) == [frames, frames]


def read(row: dict[str, Any], **options: Any) -> Any:
    return read_row(row, detect_layout(row, **options), index=3)


ASKED = {"type": "text", "text": "What happens?"}
SAME: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "<video>\nWhat happens?"}, *SAID], "videos": ["a.mp4"]},
    {"messages": [{"role": "user", "content": "What happens?"}, *SAID], "video": "a.mp4"},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, ASKED]}, *SAID]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a.mp4"}}, ASKED]}, *SAID]},
    {"messages": [{"role": "user", "content": [{"type": "video"}, ASKED]}, *SAID], "videos": ["a.mp4"]},
    # LLaVA-Video writes the marker of an image.
    {
        "conversations": [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "The sea."}],
        "video": "a.mp4",
    },
    {"video": "a.mp4", "question": "What happens?", "answer": "The sea."},
]


@pytest.mark.parametrize("row", SAME)
def test_layouts_read_the_same(row: dict[str, Any]) -> None:
    found = read(row)
    assert found.messages[0] == {"role": "user", "content": [{"type": "video"}, ASKED]}
    assert found.videos == ["a.mp4"]
    assert found.images == []


def test_a_function_gives_videos_and_features_name_their_column() -> None:
    turns = [{"role": "user", "content": "<video>What happens?"}, *SAID]
    assert read({"x": "a.mp4"}, layout=lambda row: {"messages": turns, "videos": [row["x"]]}).videos == ["a.mp4"]
    features = {"clip": datasets.Video(decode=False), "question": datasets.Value("string")}
    row = {"clip": {"bytes": b"x", "path": None}, "question": "q", "answer": "a"}
    found = detect_layout(row, features)
    assert (found.video_column, found.image_column) == ("clip", None)
    assert read_row(row, found).videos == [row["clip"]]


def test_text_that_names_the_marker_stays_text_without_videos() -> None:
    found = read({"question": "What does <video> do in HTML?", "answer": "It plays."})
    assert found.messages[0]["content"] == [{"type": "text", "text": "What does <video> do in HTML?"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SAME[0], "videos": ["a.mp4", "b.mp4"]}, "row 3: 1 video placeholders but 2 videos"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "1 video placeholders but 0 videos; no video",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1.0}]}]},
            "row 3: a video part asks for fps=1.0 of its own",
        ),
    ],
)
def test_errors_name_what_was_found(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(row)
