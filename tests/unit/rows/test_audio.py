"""Lengths of sounds without decoding are those of the decoded sounds; what is not a whole sound is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_dflop.errors import DatasetError
from hf_dflop.rows.audio import AudioInfo, audio_info, load_audio
from hf_dflop.rows.layout import detect_layout, read_row
from tests.unit.rows.sounds import sound


@pytest.mark.parametrize("container", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize(("num_samples", "rate"), [(100, 16_000), (16_001, 16_000), (48_123, 48_000), (9_999, 8_000)])
def test_told_length_is_the_decoded_one(container: str, num_samples: int, rate: int) -> None:
    encoded = sound(container, num_samples, rate)
    info = audio_info({"bytes": encoded, "path": None})
    told = num_samples if container != "ogg" else num_samples * 48_000 // rate  # Opus is always decoded at 48 kHz
    assert info == AudioInfo(num_samples=told, sampling_rate=48_000 if container == "ogg" else rate)
    assert len(load_audio({"bytes": encoded, "path": None}, info.sampling_rate)) == told
    assert len(load_audio(encoded, 16_000)) == info.resampled(16_000) == -(-num_samples * 16_000 // rate)


def test_kinds_of_cells(tmp_path: Path) -> None:
    encoded = sound("wav", 4_410, 44_100, layout="stereo")
    (tmp_path / "a.wav").write_bytes(encoded)
    expected = AudioInfo(num_samples=4_410, sampling_rate=44_100)
    cells: list[Any] = [encoded, str(tmp_path / "a.wav"), tmp_path / "a.wav", {"path": str(tmp_path / "a.wav")}]
    cells += [
        {"array": np.zeros(4_410), "sampling_rate": 44_100},
        {"array": [[0.0] * 4_410] * 2, "sampling_rate": 44_100},
    ]
    for cell in cells:
        assert audio_info(cell) == expected
        assert load_audio(cell, 16_000).shape == (1_600,)
    assert expected.duration_s == pytest.approx(0.1)


def test_decoding_is_what_counts_are_compared_with() -> None:
    tone = np.sin(np.arange(16_001) / 5)
    found = load_audio(sound("flac", 16_001), 16_000)
    assert np.abs(found - tone).max() < 1e-3
    halved = load_audio({"array": np.sin(np.arange(32_000) / 50), "sampling_rate": 32_000}, 16_000)
    assert np.abs(halved - np.sin(np.arange(16_000) / 25))[200:-200].max() < 1e-2


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": b"", "path": None}, "row 3: the sound cannot be read"),
        ({"bytes": b"no sound", "path": None}, "row 3: the sound cannot be read"),
        ({"bytes": sound("wav", 16_000)[:9_000], "path": None}, "row 3: the file is cut off: 23078 bytes are missing"),
        (
            {"bytes": sound("flac", 48_123, 48_000)[:12_000], "path": None},
            "row 3: the file ends after .* it is cut off",
        ),
        ({"bytes": sound("mp3", 16_000)[:1_500], "path": None}, "row 3: the file ends after .* it is cut off"),
        ({"bytes": sound("mp4", 16_000), "path": None}, "codec 'aac' does not tell how many samples"),
        ({"bytes": None, "path": "/nowhere/a.wav"}, "row 3: the sound cannot be read"),
        ("https://host/a.wav", "is a URL; store the sound in the dataset"),
        (3, "row 3: int is not a sound"),
        ({"array": [], "sampling_rate": 16_000}, "row 3: an array of shape"),
        ({"array": [0.0, 1.0]}, "row 3: 'array' and 'sampling_rate' are not numbers"),
        ({"array": [0.0, 1.0], "sampling_rate": 0}, "is no sound"),
    ],
)
def test_what_is_not_a_whole_sound_is_refused(cell: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        audio_info(cell, where="row 3")


def test_layouts_with_sounds() -> None:
    turns = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "x"}]
    parts = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What?"}]
    for row in (
        {"messages": turns, "audios": ["a.wav"]},
        {"messages": turns, "audio": "a.wav"},
        {"question": "What?", "answer": "x", "audio": "a.wav"},
        {"messages": [{"role": "user", "content": parts}, turns[1]]},
    ):
        read = read_row(row, detect_layout(row))
        assert read.audios == ["a.wav"]
        assert read.messages[0]["content"] == [{"type": "audio"}, {"type": "text", "text": "What?"}]
    plain = {"messages": turns, "image": None}  # of a row without sounds, the marker is text
    assert read_row(plain, detect_layout(plain)).messages[0]["content"][0]["text"] == "<audio>What?"
    two = {"question": "q", "answer": "a", "audios": ["a.wav", "b.wav"]}
    assert [part["type"] for part in read_row(two, detect_layout(two)).messages[0]["content"]] == ["audio"] * 2 + [
        "text"
    ]
    with pytest.raises(DatasetError, match="1 audio placeholders but 2 audios"):
        read_row(
            {"messages": turns, "audios": ["a.wav", "b.wav"]}, detect_layout({"messages": turns, "audios": ["a"]})
        )
