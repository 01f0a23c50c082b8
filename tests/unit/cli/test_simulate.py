"""`hf-dflop simulate` from end to end."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from hf_dflop.cli import main
from hf_dflop.profile import DatasetProfile
from tests.unit.plan import example
from tests.unit.profile.undrawn import undrawn


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "profile"
    with undrawn():
        DatasetProfile.from_shapes(example.shapes(), spec=example.spec()).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, profile: Path) -> Path:
    shutil.copytree(profile, tmp_path / "profile")
    example.plan().save(tmp_path / "plan.json")
    example.replicated().save(tmp_path / "ddp.json")
    example.record_run(tmp_path / "run", example.shapes(), vision=2, llm=1, microbatch_s=0.01, noise=0.01)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    speeds = ["--vision-tflops", "0.01", "--llm-tflops", "0.02", "--steps", "2", "--profile", "profile"]
    monkeypatch.setattr(sys, "argv", ["hf-dflop", "simulate", *speeds, *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_everything_is_written(folder: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, folder, "--plan", "plan.json", "--trace", "t.json", "--html", "t.html") == 0
    assert "2 steps of 48 samples on 8 ranks" in capsys.readouterr().out
    assert json.loads((folder / "t.json").read_text())["traceEvents"]
    assert "<canvas" in (folder / "t.html").read_text()


def test_against_a_run(folder: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, folder, "--plan", "ddp.json", "--against", "run", "--save-calibration", "--json") == 0
    before = json.loads(capsys.readouterr().out)["comparison"]["kinds"][-1]
    assert before["error"] > 0.1
    assert before["error_after"] < 0.03
    assert run(monkeypatch, folder, "--plan", "ddp.json", "--against", "run") == 0
    told = capsys.readouterr()
    assert "with profile/calibration.json" in told.err
    step = next(line for line in told.out.splitlines() if line.startswith("step  "))
    assert float(step.split()[-2].rstrip("%")) < 3
    assert run(monkeypatch, folder, "--plan", "ddp.json", "--llm-tflops", "1") == 0
    assert "it corrects another cost model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan", "no.json"], "no.json is not a file"),
        (["--plan", "t.txt"], "the plan is not JSON"),
        (["--plan", "newer.json"], "schema version 2"),
        (["--plan", "edited.json"], "must divide"),
        (["--plan", "other.json"], "of different models"),
        (["--plan", "plan.json", "--profile", "nowhere"], "is not there"),
        (["--plan", "plan.json", "--cost-model", "t.txt"], "is not JSON"),
        (["--plan", "plan.json", "--intra-gbytes", "0"], "intra_bytes_per_s is 0.0"),
        (["--plan", "plan.json", "--inter-gbytes", "1"], "needs --intra-gbytes"),
        (["--plan", "plan.json", "--against", "run"], "the run has 2 ranks, the plan 8"),
        (["--plan", "plan.json", "--against", "profile"], "no trace-rank"),
        (["--plan", "plan.json", "--save-calibration"], "needs a run"),
        (["--plan", "plan.json", "--trace", "deep/t.json"], "cannot be written"),
    ],
)
def test_mistakes(folder: Path, monkeypatch, capsys, arguments: list[str], says: str) -> None:
    written = json.loads((folder / "plan.json").read_text())
    (folder / "t.txt").write_text("no")
    (folder / "newer.json").write_text(json.dumps(written | {"schema_version": 2}))
    (folder / "edited.json").write_text(json.dumps(written | {"fsdp_shards": 2}))
    other = written | {"llm": written["llm"] | {"layers": [4, 5]}}
    (folder / "other.json").write_text(json.dumps(other))
    assert run(monkeypatch, folder, *arguments, "--html", "page.html") == 2
    assert says in capsys.readouterr().err
    assert not (folder / "page.html").exists(), "nothing half-written"
