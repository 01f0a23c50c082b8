"""`hf-dflop report`: the right culprit, whole and partial traces, one page that needs nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_dflop.cli import app
from hf_dflop.errors import DatasetError
from hf_dflop.integrations.report import straggler_report
from tests.unit.integrations.traces import write_run


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "trace"
    write_run(folder, vision_off=1.6)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "trace"))


def test_it_names_the_slow_rank_its_machine_and_the_samples(run: Path) -> None:
    result = invoke(run.parent)  # the folder above is enough
    assert result.exit_code == 0
    assert "Rank 2 (on node1) is slow itself: it takes 1.3" in result.output
    assert "mostly " in result.output
    assert "samples " in result.output
    found = json.loads(invoke(run, "--json", "--microbatches", 2).stdout)
    assert found["slow_ranks"] == [2]
    assert found["slowest_rank"] == 2
    assert len(found["slowest_microbatches"]) == 2
    assert found["num_cost_versions"] == 1
    assert found["factors"] == pytest.approx([1.0, 1.0], abs=0.06)
    assert found["idle_fraction"] > 0.1


def test_it_names_the_module_that_was_priced_wrongly(tmp_path: Path) -> None:
    write_run(tmp_path, slow=None, vision_off=1.8, steps=16)  # the first half has uncorrected costs
    for path in tmp_path.iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    report = straggler_report(tmp_path)
    assert report.slow_ranks == ()
    assert any("vision encoder takes 1.8" in sentence or "vision encoder takes 1.7" in sentence
               for sentence in report.verdict())  # fmt: skip
    assert any("take turns" in sentence or "got more work" in sentence for sentence in report.verdict())


def test_the_page_is_whole_and_fetches_nothing(run: Path, tmp_path: Path) -> None:
    result = invoke(run, "-o", tmp_path / "new" / "report.html")
    assert result.exit_code == 0
    page = (tmp_path / "new" / "report.html").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    for told in ("Who waited for whom?", "is slow itself", "What did each rank do?", "the most waiting", "node1",
                 "Were the costs predicted well?", "costs, version 1"):  # fmt: skip
        assert told in page, told
    head = page.split("</style>")[0] + page.split("</head>")[1]
    assert "src=" not in head
    assert "This trace is not whole" not in page


def test_a_missing_rank_and_a_cut_line_are_told_and_the_rest_is_reported(copy: Path, tmp_path: Path) -> None:
    (copy / "trace-rank00001.jsonl").unlink()
    path = copy / "trace-rank00003.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) * 2 // 3])
    result = invoke(copy, "-o", tmp_path / "report.html")
    assert result.exit_code == 0
    assert "1 of 4 ranks left no steps here (1)" in result.output
    assert "trace-rank00003.jsonl: 1 lines cannot be read" in result.output
    assert "rank 3 ends at step 26, others go on to step 40" in result.output
    assert "at least" in result.output
    assert "This trace is not whole" in (tmp_path / "report.html").read_text()
    assert json.loads(invoke(copy, "--json").stdout)["missing_ranks"] == [1]


def test_the_last_rank_is_missed_too(copy: Path) -> None:
    (copy / "trace-rank00003.jsonl").unlink()
    assert straggler_report(copy).missing_ranks == (3,)


def test_a_trace_with_one_step_of_one_rank_without_gradients(tmp_path: Path) -> None:
    record = {
        "step": 1,
        "epoch": 0,
        "rank": 0,
        "begin_s": 1,
        "data_s": 0,
        "slot_end_s": [],
        "sync_end_s": 2,
        "end_s": 3,
    }
    (tmp_path / "trace-rank00000.jsonl").write_text(json.dumps(record) + "\n")
    result = invoke(tmp_path, "-o", tmp_path / "report.html")
    assert result.exit_code == 0
    assert "Waiting was not measured" in (tmp_path / "report.html").read_text()
    assert json.loads(invoke(tmp_path, "--json").stdout)["idle_fraction"] is None


@pytest.mark.parametrize("content", ["", "not json\n", '{"step": 1}\n', "\x00\x01\n"])
def test_files_in_which_nothing_can_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "trace-rank00000.jsonl").write_text(content)
    with pytest.raises(DatasetError, match="no step can be read"):
        invoke(tmp_path)


def test_folders_that_are_no_trace(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no trace-rank\*.jsonl in .*DflopCallback\(trace_dir"):
        invoke(tmp_path)
    with pytest.raises(DatasetError, match="there is no folder"):
        invoke(tmp_path / "nowhere")
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name)
    with pytest.raises(DatasetError, match=r"several runs \(a, b\)"):
        invoke(tmp_path)
    with pytest.raises(DatasetError, match="is a folder"):
        invoke(run, "-o", tmp_path)
    assert "trace_dir" in invoke("--help").output
