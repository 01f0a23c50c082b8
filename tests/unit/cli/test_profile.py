"""The command line from end to end, in this process and as a program."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from hf_dflop.cli import main
from hf_dflop.profile import DatasetProfile
from tests.unit.profile.test_bad_rows import mixed
from tests.unit.profile.test_dataset import make
from tests.unit.profile.undrawn import undrawn
from tests.unit.rows import tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def _undrawn() -> Iterator[None]:
    with undrawn():
        yield


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny.llava().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-dflop", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_a_summary_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    make(6).save_to_disk(tmp_path / "data")
    output = tmp_path / "deep" / "out"
    code = run(monkeypatch, "profile", str(tmp_path / "data"), "-p", model, "-o", str(output))
    said = capsys.readouterr().out
    assert code == 0
    assert "6 samples" in said
    assert "report.html" in said.replace("\n", "")
    assert {path.name for path in output.iterdir()} >= {"profile.json", "shapes.npz", "report.html"}
    assert DatasetProfile.load(output).num_samples == 6
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_json_is_one_object_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    mixed()[0].select([2, 5, 1, 9]).save_to_disk(tmp_path / "data")
    command = [sys.executable, "-m", "hf_dflop.cli", "profile", str(tmp_path / "data"), "-p", model, "--json"]
    done = subprocess.run([*command, "--on-error", "skip"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["num_samples"] == 3
    assert [error["index"] for error in found["errors"]] == [2]
    assert found["totals"]["num_images"] == 3
    assert run(monkeypatch, *command[3:]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].startswith("hf-dflop: row 2, column 'image', image 0")
    assert "Traceback" not in told.err


@pytest.mark.usefixtures("_undrawn")
def test_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    datasets.DatasetDict(train=make(3), test=make(4)).save_to_disk(tmp_path / "data")
    arguments = ("profile", str(tmp_path / "data"), "-p", model, "--json")
    assert run(monkeypatch, *arguments, "-o", str(tmp_path / "out")) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert {name: split["num_samples"] for name, split in splits.items()} == {"train": 3, "test": 4}
    assert (tmp_path / "out" / "test" / "profile.json").exists()
    assert run(monkeypatch, *arguments, "--split", "test", "--max-samples", "2", "--streaming") == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 2


def test_mistakes_end_with_code_2_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    make(3).save_to_disk(tmp_path / "data")
    output = tmp_path / "out"
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("profile", str(tmp_path / "nowhere"), "-p", model, "-o", str(output)), "cannot be loaded"),
        (("profile", str(tmp_path / "data"), "-p", str(tmp_path / "no_model"), "-o", str(output)), "cannot be loaded"),
        (("profile", str(tmp_path / "data"), "-p", model, "--split", "x", "-o", str(tmp_path / "file")), "is a file"),
        (
            ("profile", str(tmp_path / "data"), "-p", model, "--image-column", "x", "-o", str(output)),
            "no image column",
        ),
    ):
        assert run(monkeypatch, *arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert said in told.err.splitlines()[-1]
        assert not output.exists()
    assert run(monkeypatch, "profile", str(tmp_path / "data"), "-p", model, "--on-error", "ignore") == 2
    assert run(monkeypatch, "profile", str(tmp_path / "data")) == 2


@pytest.mark.usefixtures("_undrawn")
def test_parts_and_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    make(7).save_to_disk(tmp_path / "data")
    arguments = ("profile", str(tmp_path / "data"), "-p", model, "--json")
    parts = [str(tmp_path / f"part{i}") for i in range(2)]
    assert run(monkeypatch, *arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    for i, part in enumerate(parts):
        assert run(monkeypatch, *arguments, "--shard", f"{i}/2", "-o", part) == 0
    capsys.readouterr()
    assert run(monkeypatch, "merge", *parts, "-o", str(tmp_path / "whole"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert run(monkeypatch, *arguments, "--shard", "2/2") == 2
    assert "is not I/N" in capsys.readouterr().err


@pytest.mark.usefixtures("_undrawn")
def test_each_launched_process_counts_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    """With what torchrun and accelerate set for each process."""
    make(7).save_to_disk(tmp_path / "data")
    arguments = ("profile", str(tmp_path / "data"), "-p", model, "--json")
    assert run(monkeypatch, *arguments) == 0
    whole = json.loads(capsys.readouterr().out)
    output = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert run(monkeypatch, *arguments, "-o", str(output)) == 0
    capsys.readouterr()
    parts = sorted(str(path) for path in output.iterdir())
    assert [Path(part).name for part in parts] == [f"part-{i:05}-of-00003" for i in range(3)]
    assert run(monkeypatch, "merge", *parts, "-o", str(output), "--json") == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert DatasetProfile.load(output).totals == whole["totals"]
    assert run(monkeypatch, *arguments, "--max-samples", "2") == 2
    assert "in parts as a whole" in capsys.readouterr().err


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "profile", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())  # however wide the terminal is
    for word in ("without decoding a pixel", "Examples", "--on-error", "--max-samples", "--json"):
        assert word in text
