"""The GPU topic at a tiny size on a CPU: it runs end to end, goes on where it stopped, and reports what it saw."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_dflop.cost import CostModel, ModelSpec
from recipes.benchmarks import __main__ as benchmarks
from recipes.benchmarks.balancing.settings import ARMS, Arm
from recipes.benchmarks.common.results import Result, hardware, make_result
from recipes.benchmarks.gpu import __main__ as runner
from recipes.benchmarks.gpu.engine import check_same
from recipes.benchmarks.gpu.model import MicrobatchMaker, build_model, model_config, replay_shapes
from recipes.benchmarks.gpu.replay import Replay, draw_epoch, step_seconds
from recipes.benchmarks.gpu.report import figures, section
from recipes.benchmarks.gpu.settings import ENGINE_ARMS, MIX_NAMES, GpuSettings, tiny

TINY = tiny(GpuSettings(device="cpu", dtype="float32"))
ABSENT = ("datasets", "evaluate", "imagesize", "trl")
"""Packages that a bare GPU machine lacks."""


_BARE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ImportError(name + " is absent")

sys.meta_path.insert(0, Absent())
from recipes.benchmarks.gpu import report
from recipes.benchmarks.gpu.__main__ import main
main(["--device", "cpu", "--tiny", "--output-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The output folder of a tiny run in a process without the packages that are absent on a bare GPU machine, and the
    result that it would have saved."""
    folder = tmp_path_factory.mktemp("gpu")
    run = subprocess.run(
        [sys.executable, "-c", _BARE, str(folder)],
        check=False,
        timeout=280,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "not saved as a result" in run.stdout
    return folder, runner.collect(GpuSettings.load(folder / "settings.json"), folder)


def test_a_tiny_run_measures_every_part(finished: tuple[Path, Result], capsys: pytest.CaptureFixture[str]) -> None:
    folder, result = finished
    assert {row["module"] for row in result.of_kind("module")} == {"vision", "connector", "llm", "llm_head"}
    runs = result.of_kind("replay")
    assert {(run["mix"], run["arm"]) for run in runs} == {(mix, arm.name) for mix in MIX_NAMES for arm in ARMS}
    for run in runs:
        assert len(run["predicted_measured_s"]) == TINY.num_ranks * TINY.num_slots * TINY.num_steps
        assert all(seconds > 0 for pair in run["predicted_measured_s"] for seconds in pair)
        assert run["computed_tokens"] == run["tokens"] if run["packed"] else run["computed_tokens"] >= run["tokens"]
    assert len({run["tokens"] for run in runs if run["mix"] == "onevision"}) == 1  # the same samples in every arm
    assert {row["arm"] for row in result.of_kind("engine")} == set(ENGINE_ARMS)

    told = section(result)
    assert all(f"### {title}" in told for title in ("Module curves", "Samplers", "Predicted and", "Two stages"))
    assert [figure.name for figure in figures(result)] == ["gpu_curves", "gpu_replay", "gpu_prediction"]

    # A second invocation measures nothing: what is there is kept, to the last digit.
    before = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    runner.main(["--device", "cpu", "--tiny", "--output-dir", str(folder)])
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")} == before
    assert "samples/s" not in capsys.readouterr().out


def test_an_interrupted_replay_goes_on_and_counts_whole_rounds(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = finished
    for name in ("settings.json", "profile.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = json.loads((folder / "replay.json").read_text(encoding="utf-8"))
    (tmp_path / "replay.json").write_text(json.dumps(whole[:-1]))
    mixes = {row["mix"] for row in runner.collect(TINY, tmp_path).of_kind("replay")}
    assert mixes == {MIX_NAMES[0]}  # the second one lacks an arm
    runner.main(["--device", "cpu", "--tiny", "--parts", "replay", "--output-dir", str(tmp_path)])
    found = json.loads((tmp_path / "replay.json").read_text(encoding="utf-8"))
    assert found[:-1] == whole[:-1]
    assert found[-1]["arm"] == whole[-1]["arm"]
    with pytest.raises(SystemExit, match="other settings or another card"):
        runner.main(["--device", "cpu", "--tiny", "--rounds", "3", "--output-dir", str(tmp_path)])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device, nothing was measured"):
        runner.main(["--output-dir", str(tmp_path / "a")])
    with pytest.raises(SystemExit):
        runner.main(["--device", "cpu", "--output-dir", str(tmp_path / "b")])
    assert "goes with --tiny alone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "gpu"])
    monkeypatch.setattr("recipes.benchmarks.common.page.write_page", list)
    benchmarks.main()
    assert "left out, torch sees no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_by_sample"])
def test_padded_and_packed_microbatches_are_the_same_training(attention: str) -> None:
    settings = replace(TINY, dtype="float64", attention=attention)
    shapes = replay_shapes("onevision", settings, 0)
    model = build_model(settings)
    group = np.argsort(-shapes.image_tiles)[:3].tolist()
    divisor = torch.tensor(int(shapes.label_tokens[group].sum()))
    found = []
    for packed in (False, True):
        batch = MicrobatchMaker(model, settings)(shapes, group, packed=packed)
        assert len(batch["pixel_values"]) == shapes.image_tiles[group].sum()
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == shapes.image_tokens[group].sum()
        assert int((batch["labels"][:, 1:] != -100).sum()) == divisor
        loss = model(**batch, num_items_in_batch=divisor).loss
        (grad,) = torch.autograd.grad(loss, [model.lm_head.weight])
        found.append((loss, grad))
    # transformers takes the logits to float32 for the loss
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=1e-9)


def test_attention_sample_by_sample_is_the_masked_one() -> None:
    """On the same packed row; and where samples begin matters: this is not plain attention over all of the row."""
    shapes = replay_shapes("chart_doc", TINY, 0)
    losses: dict[str, float] = {}
    for attention in ("sdpa", "sdpa_by_sample"):
        settings = replace(TINY, dtype="float64", attention=attention)
        model = build_model(settings)
        batch = MicrobatchMaker(model, settings)(shapes, [0, 1, 2], packed=True)
        losses[attention] = float(model(**batch).loss.detach())
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        losses[f"{attention}, joined"] = float(model(**batch).loss.detach())
    assert losses["sdpa_by_sample"] == pytest.approx(losses["sdpa"], rel=1e-10)
    assert losses["sdpa_by_sample, joined"] == pytest.approx(losses["sdpa, joined"], rel=1e-10)
    assert losses["sdpa_by_sample, joined"] != pytest.approx(losses["sdpa"], rel=1e-6)


def test_a_step_takes_its_slowest_rank() -> None:
    """Two steps of two ranks: 3 and 1 seconds, then 2 and 4; the mean rank waits 1 of 3, then 1 of 4."""
    seconds, waiting = step_seconds(np.array([[[1.0, 2.0], [1.0, 0.0]], [[2.0, 0.0], [1.0, 3.0]]]))
    assert seconds == 7.0
    assert waiting == pytest.approx(2 / 7)


def test_what_does_not_fit_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = CostModel.analytic(ModelSpec.from_config(model_config(TINY)))
    epoch = draw_epoch("chart_doc", TINY, 0, cost)
    replaying = Replay(TINY, build_model(TINY), cost)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(replaying, "model", full)
    monkeypatch.setattr(full, "zero_grad", lambda **_: None, raising=False)
    run = replaying.run(epoch, Arm(sampler="stock", packed=False))
    assert (run["fits"], run["seconds"], run["predicted_measured_s"]) == (False, None, [])
    assert run["predicted_s"] > 0


def test_engines_that_compute_something_else_are_noticed() -> None:
    rows = [{"arm": arm, "loss": 2.0, "norm": 3.0} for arm in ENGINE_ARMS]
    check_same(rows)
    for name, value in (("loss", 2.001), ("norm", 3.01), ("loss", float("nan"))):
        with pytest.raises(RuntimeError, match=f"different {name}"):
            check_same([*rows[:-1], rows[-1] | {name: value}])


def _result() -> Result:
    rows: list[dict[str, Any]] = [
        {
            "kind": "module", "module": "llm", "num_fitted": 20, "num_held_out": 2, "median_error": 0.03,
            "p95_error": 0.2, "most_tokens": 4096, "tokens_seconds_error": [[64, 0.1, 0.01], [128, 0.2, 0.2]],
        }
    ]  # fmt: skip
    for round_ in range(2):
        for at, arm in enumerate(ARMS):
            fits = arm.name != "omnibal"
            seconds = 8.0 if arm.name == "stock" else 2.0 if arm.name == "hf_dflop+packed" else 4.0 + 0.1 * at
            rows.append(
                {
                    "kind": "replay", "mix": "chart_doc", "round": round_, "arm": arm.name, "sampler": arm.sampler,
                    "packed": arm.packed, "fits": fits, "num_samples": 16, "tokens": 100, "computed_tokens": 150,
                    "seconds": seconds if fits else None, "waiting": 0.02 if fits else None, "predicted_s": seconds,
                    "predicted_waiting": 0.01, "peak_memory_bytes": 3 * 2**30,
                    "predicted_measured_s": [[1.0, 1.1], [2.0, 2.2]] if fits else [],
                }
            )  # fmt: skip
        rows += [
            {"kind": "engine", "arm": arm, "round": round_, "seconds": 0.1 * (1 + 0.02 * i), "loss": 1.0, "norm": 1.0}
            for i, arm in enumerate(ENGINE_ARMS)
        ]
    return make_result("gpu", rows, command="c", settings={}, gpu="one Large Card (80 GiB)")


def test_the_report_says_what_the_numbers_are(tmp_path: Path) -> None:
    result = _result()
    told = section(result)
    assert "| llm | 20 | 2 | 4096 | 3.0 % | 20.0 % ✗ |" in told
    assert "| stock random | 2.0 (2.0–2.0) | 1.00 (1.00–1.00) |  | 2.0 (2.0–2.0) % | 1.50 (1.50–1.50) | 3 |" in told
    assert "| OmniBal (ISF) | does not fit |" in told
    assert "hf_dflop packed ÷ stock: 4.00 (4.00–4.00) (wanted 1.7) ✓" in told
    assert "÷ the best other padded (group_by_length): 2.05 (2.05–2.05) (wanted 1.15) ✓" in told
    assert "| `chart_doc` | stock | 4 | 9 % | 9 % | 1.10 | 1.0 (1.0–1.0) % | 2.0 (2.0–2.0) % |" in told
    assert "`chart_doc` | omnibal |" not in told
    assert "Ours ÷ torch: 1.020 (wanted at most 1.05) ✓" in told
    pytest.importorskip("matplotlib")
    from recipes.benchmarks.common.figures import draw

    assert all(draw(figure, tmp_path).stat().st_size for figure in figures(result))


def test_the_machine_names_its_gpu() -> None:
    assert hardware().endswith(", no GPU used")
    assert _result().hardware.endswith(", one Large Card (80 GiB)")
