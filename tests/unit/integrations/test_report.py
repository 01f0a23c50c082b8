"""The straggler report, from traces whose numbers are known, and from a real run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_dflop import DflopCallback
from hf_dflop.errors import DatasetError
from hf_dflop.integrations.report import straggler_report
from tests.distributed import tiny
from tests.distributed.harness import train


def write(folder: Path, rank: int, steps: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps({"rank": rank, "epoch": 0, **step}) + "\n" for step in steps)
    (folder / f"trace-rank{rank:05d}.jsonl").write_text(lines)


def step(number: int, slots: list[float], *, end: float, offset: float, predicted: list[float]) -> dict[str, Any]:
    """A step that begins at 10 x number; all ranks leave the reduction `end` s later, the optimizer takes 1 s."""
    begin = 10.0 * number + offset
    return {
        "step": number, "begin_s": begin, "data_s": 0.5, "sync_end_s": begin + end, "end_s": begin + end + 1,
        "slot_end_s": [begin + sum(slots[: k + 1]) for k in range(len(slots))],
        "samples": [[number, 7], [8]], "slot_predicted_s": predicted,
    }  # fmt: skip


def two_ranks(folder: Path) -> None:
    # Rank 0 computes 2 + 2 s, rank 1 4 + 2 s, then both leave the reduction 7 s after they began. Predictions are
    # in units of a tenth of a second, and rank 1's first microbatch was thought to be like the others.
    fast = [step(n, [2, 2], end=7, offset=0, predicted=[20, 20]) for n in (1, 2, 3)]
    slow = [step(n, [4, 2], end=7, offset=1000, predicted=[20, 20]) for n in (1, 2, 3)]
    write(folder, 0, fast)
    write(folder, 1, slow)


def test_by_hand(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    report = straggler_report(tmp_path)
    assert (report.num_steps, report.slowest_rank) == (2, 1)
    assert report.step_s == pytest.approx(8.5)
    assert [(r.busy_s, r.idle_s, r.data_s) for r in report.ranks] == [(4, 2, 0.5), (6, 0, 0.5)]
    assert [r.slowest_share for r in report.ranks] == [0, 1]
    assert (report.sync_s, report.optimizer_s) == (1, 1)
    assert report.idle_fraction == pytest.approx(1 / 8.5)
    assert report.scale == pytest.approx(0.1)
    assert [r.slowdown for r in report.ranks] == pytest.approx([1, 1.5])
    assert report.prediction_error == pytest.approx(0.5 / 2.5)
    worst = report.slowest_microbatches[0]
    assert (worst.step, worst.rank, worst.slot, worst.samples) == (2, 1, 0, (2, 7))
    assert worst.ratio == pytest.approx(2)
    text = report.summary()
    assert "rank 1 computes longest: 6000.0 ms busy per step, the mean rank 5000.0 ms" in text
    assert "step 2, rank 1, microbatch 0: 4000.0 ms, predicted 2000.0 ms (2.00x); samples 2, 7" in text
    assert json.loads(json.dumps(report.to_json()))["slowest_microbatches"][0]["samples"] == [2, 7]


def test_a_resumed_run_counts_repeated_steps_once(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    path = tmp_path / "trace-rank00000.jsonl"
    again = step(3, [3, 3], end=8, offset=0, predicted=[20, 20]) | {"rank": 0}
    path.write_text(path.read_text() + json.dumps(again) + "\n" + '{"step": 4, "cut off')
    report = straggler_report(tmp_path, skip_steps=0, num_microbatches=2)
    assert report.num_steps == 3
    assert report.ranks[0].busy_s == pytest.approx((4 + 4 + 6) / 3)
    assert len(report.slowest_microbatches) == 2


def test_without_gradient_hooks_or_predictions(tmp_path: Path) -> None:
    bare = step(1, [], end=3, offset=0, predicted=[])
    write(tmp_path, 0, [{key: value for key, value in bare.items() if key not in ("samples", "slot_predicted_s")}])
    report = straggler_report(tmp_path)
    assert report.slowest_rank is None
    assert math.isnan(report.ranks[0].busy_s)
    assert math.isnan(report.ranks[0].slowdown)
    assert "not measured" in report.summary()


def test_files_of_different_runs(tmp_path: Path) -> None:
    write(tmp_path, 0, [step(1, [1], end=2, offset=0, predicted=[1])])
    write(tmp_path, 1, [step(2, [1], end=2, offset=0, predicted=[1])])
    with pytest.raises(DatasetError, match="no step in common"):
        straggler_report(tmp_path)
    with pytest.raises(FileNotFoundError):
        straggler_report(tmp_path / "none")


def test_a_real_run(tmp_path: Path) -> None:
    dataset, _ = tiny.rows(29)
    trainer = train(dataset, [DflopCallback(dataset, trace_dir=tmp_path)], max_steps=6)
    report = straggler_report(tmp_path)
    assert (report.num_steps, report.slowest_rank) == (5, 0)
    logged = [log["dflop/busy_s_rank0"] for log in trainer.state.log_history if "dflop/busy_s_rank0" in log][1:]
    assert report.ranks[0].busy_s == pytest.approx(sum(logged) / 5, rel=1e-3)
    assert report.ranks[0].idle_s == 0
    assert report.scale > 0
    assert all(found.samples for found in report.slowest_microbatches)
    assert report.summary().startswith("5 steps on 1 ranks, ")
