"""Datasets with sounds: every source, bad rows, what is kept beside them, and the report."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from hf_dflop.cost import CostModel
from hf_dflop.data import VisionLanguageCollator
from hf_dflop.errors import DatasetError, ProcessorError
from hf_dflop.profile import DatasetProfile, profile_dataset
from hf_dflop.profile.source import without_decoding
from hf_dflop.shapes import NEEDED_COLUMNS, SHAPE_COLUMNS, Shapes
from tests.distributed import hearing
from tests.unit.rows import tiny
from tests.unit.rows.sounds import sound

LENGTHS = [400, 16_001, 48_000]
CONFIG = SimpleNamespace(audio_config=SimpleNamespace(n_window=100))


def cell(length: int, container: str = "wav") -> dict[str, Any]:
    return {"bytes": sound(container, length), "path": None}


def questions(sounds: list[Any], **more: Any) -> dict[str, list[Any]]:
    return {"question": ["What?"] * len(sounds), "answer": ["a cat"] * len(sounds), "audio": sounds, **more}


def counts(annotated: Any) -> list[list[int]]:
    return [[row[name] for name in SHAPE_COLUMNS] for row in annotated.remove_columns("audio")]


def test_every_source_gives_the_same_counts(tmp_path: Path) -> None:
    processor = tiny.qwen2_audio()
    plain = datasets.Dataset.from_dict(questions([cell(n, "flac") for n in LENGTHS]))
    annotated, profile = profile_dataset(plain, processor)
    expected = counts(annotated)
    assert annotated["dflop_audio_tokens"][:] == [1, 25, 75]
    assert annotated["dflop_audio_frames"][:] == [3000] * 3
    assert annotated["dflop_num_audios"][:] == [1] * 3
    assert annotated["dflop_audio_ms"][:] == [25, 1000, 3000]
    assert profile.totals["audio_tokens"] == 101
    assert profile.totals["llm_tokens"] == profile.totals["text_tokens"] + 101
    assert "audio_ms" in profile.summary()
    typed = plain.cast_column("audio", datasets.Audio())
    for i, length in enumerate(LENGTHS):
        (tmp_path / f"{i}.wav").write_bytes(sound("wav", length))
    paths = [str(tmp_path / f"{i}.wav") for i in range(3)]
    arrays = [{"array": np.zeros(n).tolist(), "sampling_rate": 16_000} for n in LENGTHS]
    for given in (typed, datasets.Dataset.from_dict(questions(paths)), datasets.Dataset.from_dict(questions(arrays))):
        assert counts(profile_dataset(given, processor)[0]) == expected
    stream, _ = profile_dataset(plain.to_iterable_dataset(), processor)
    assert [[row[name] for name in SHAPE_COLUMNS] for row in stream] == expected


def test_images_sounds_and_text_side_by_side() -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (60, 90)).save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": None}
    rows = [([cell(9_000), cell(30_001)], [image]), ([], []), ([cell(480_001)], []), ([], [image])]
    data = datasets.Dataset.from_dict(questions([s for s, _ in rows], image=[i for _, i in rows]))
    processor = tiny.qwen2_5_omni()
    if "replace_image_token" not in vars(type(processor)):
        with pytest.raises(ProcessorError, match="does not report what it writes in place of an image"):
            profile_dataset(data, processor, config=CONFIG)
        pytest.skip("this transformers' processor does not tell what it writes, and was refused")
    annotated, _ = profile_dataset(data, processor, config=CONFIG, verify=4)  # all are really processed
    assert annotated["dflop_num_audios"][:] == [2, 0, 1, 0]
    assert annotated["dflop_num_images"][:] == [1, 0, 0, 1]
    assert annotated["dflop_audio_chunks"][:] == [2, 0, 15, 0]
    batch = VisionLanguageCollator(tiny.qwen2_5_omni())([annotated[i] for i in range(4)])
    assert batch["input_ids"].shape[0] == 4
    assert len(batch["input_features"]) == 3
    assert (batch["attention_mask"].sum(dim=1).numpy() == Shapes.of_dataset(annotated).llm_tokens).all()


def test_bad_sounds_are_raised_skipped_or_marked() -> None:
    whole = cell(16_000)
    cut, empty = {"bytes": whole["bytes"][:9_000], "path": None}, {"bytes": b"", "path": None}
    gone = {"bytes": None, "path": "/nowhere/a.wav"}
    data = datasets.Dataset.from_dict(questions([whole, cut, empty, gone, cell(10)]))
    processor = tiny.qwen2_audio()
    with pytest.raises(DatasetError, match="row 1, column 'audio', sound 0: the file is cut off"):
        profile_dataset(data, processor, verify=0)
    skipped, profile = profile_dataset(data, processor, verify=0, on_error="skip")
    assert len(skipped) == 1
    assert [error.index for error in profile.errors] == [1, 2, 3, 4]
    assert "too short" in profile.errors[-1].reason
    marked, _ = profile_dataset(data, processor, verify=0, on_error="mark")
    assert marked["dflop_audio_tokens"][:] == [25, 0, 0, 0, 0]
    with pytest.raises(DatasetError, match="row 0: holds a sound, and LlavaProcessor takes none"):
        profile_dataset(data.select([0]), tiny.llava(), verify=0)
    with pytest.raises(DatasetError, match="row 0: holds an image, and Qwen2AudioProcessor takes none"):
        profile_dataset(data.select([0]).add_column("image", [whole]), processor, verify=0)


def test_a_cut_through_a_sound_is_refused() -> None:
    data = datasets.Dataset.from_dict(questions([cell(48_000)]))
    with pytest.raises(DatasetError, match="audio tokens, and images, videos and sounds cannot be cut"):
        profile_dataset(data, tiny.qwen2_audio(), verify=0, max_length=40)


def test_annotations_stay_and_older_ones_are_read(tmp_path: Path) -> None:
    annotated, profile = profile_dataset(
        datasets.Dataset.from_dict(questions([cell(n) for n in LENGTHS])), tiny.qwen2_audio()
    )
    annotated.save_to_disk(str(tmp_path / "data"))
    again = datasets.load_from_disk(str(tmp_path / "data"))
    assert Shapes.of_dataset(again).fingerprint() == Shapes.of_dataset(annotated).fingerprint()
    profile.save(tmp_path / "profile", samples=False)
    assert DatasetProfile.load(tmp_path / "profile").totals == profile.totals
    older = Shapes.from_columns({name: [1, 2] for name in NEEDED_COLUMNS})
    assert older.num_audios.tolist() == [0, 0]
    assert older.llm_tokens.tolist() == [2, 4]
    with pytest.raises(DatasetError, match="no 'dflop_audio_ms'"):
        Shapes.from_columns({name: [1] for name in SHAPE_COLUMNS if name != "dflop_audio_ms"})
    assert without_decoding(again).column_names == ["question", "answer", "audio"]


def test_a_model_without_a_known_audio_encoder_has_no_costs() -> None:
    config = {
        "vision_config": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                          "patch_size": 14},
        "text_config": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                        "vocab_size": 32},
    }  # fmt: skip
    from hf_dflop.profile.policy import spec_of

    silent = Shapes.from_columns({name: [1, 2] for name in NEEDED_COLUMNS})
    heard = Shapes.from_columns({name: [1, 2] for name in SHAPE_COLUMNS})
    spec = spec_of(config, silent)
    assert spec is not None
    assert spec_of(config, heard) is None
    with pytest.raises(ValueError, match="2 samples have sounds, and the spec has no audio encoder"):
        CostModel.analytic(spec).vision_s(heard)
    whisper = {
        "num_mel_bins": 8,
        "d_model": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
    }
    full = spec_of({**config, "audio_config": whisper}, heard)
    assert full is not None
    assert type(full).from_json(full.to_json()) == full
    cost = CostModel.analytic(full)
    assert (cost.vision_s(heard) > cost.vision_s(silent)).all()
    assert CostModel.from_json(cost.to_json()) == cost


def test_archives_of_sounds(tmp_path: Path) -> None:
    """WebDataset: members of a row share a name, and their endings are the columns."""
    said = {"question": "What?", "answer": "a cat"}
    processor = tiny.qwen2_audio(4)  # chunks of four seconds, for less time in the feature extractor
    for container in ("wav", "flac", "mp3"):
        with tarfile.open(tmp_path / f"{container}.tar", "w") as archive:
            for i, length in enumerate(LENGTHS):
                members = (
                    (container, sound(container, length)),
                    ("txt", b"a cat"),
                    ("json", json.dumps(said).encode()),
                )
                for ending, content in members:
                    entry = tarfile.TarInfo(f"s{i}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        plain = {"text": ["a cat"] * 3, "audio": [cell(n, container) for n in LENGTHS]}
        expected = counts(profile_dataset(datasets.Dataset.from_dict(plain), processor)[0])
        for streaming in (False, True):
            annotated, _ = profile_dataset(tmp_path / f"{container}.tar", processor, streaming=streaming)
            told = [[row[name] for name in SHAPE_COLUMNS] for row in annotated.remove_columns(container)]
            assert told == expected

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        turns = [{"role": "user", "content": row["json"]["question"]}]
        turns.append({"role": "assistant", "content": row["json"]["answer"]})
        return {"messages": turns, "audios": [row["flac"]]}

    annotated, _ = profile_dataset(tmp_path / "flac.tar", processor, layout=asked)
    with_question = profile_dataset(datasets.Dataset.from_dict(questions([cell(n) for n in LENGTHS])), processor)
    assert annotated["dflop_text_tokens"][:] == with_question[0]["dflop_text_tokens"][:]


def test_the_report_of_sounds_speaks_of_sounds(tmp_path: Path) -> None:
    model = hearing.audioflamingo3(processor := tiny.audioflamingo3())
    data = datasets.Dataset.from_dict(questions([cell(n) for n in LENGTHS] * 4))
    annotated, profile = profile_dataset(data, processor, config=model.config)
    assert profile.spec is not None
    assert not profile.spec.takes_images
    profile.save(tmp_path, dataset=annotated)
    assert DatasetProfile.load(tmp_path).spec == profile.spec
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    told = page[page.index("<body>") :]
    for text in ("samples, 12 sounds of 16 seconds", "in the audio encoder", "<th>seconds</th>", "encoder TFLOP"):
        assert text in told
    for text in ("vision", "images", "patches"):
        assert text not in told.replace("samples have images", "")
    assert "image" not in profile.summary()
