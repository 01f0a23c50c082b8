"""Simulated steps of a dataset, and a recorded run beside them."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import hf_dflop
from hf_dflop.errors import DatasetError, PlanError
from hf_dflop.plan import CAUSES, Calibration, ModulePlan, plan_step
from hf_dflop.plan.calibration import ACTION_KINDS
from hf_dflop.plan.compare_run import compare_run
from hf_dflop.plan.page import timeline_page
from hf_dflop.plan.recorded import recorded_steps
from hf_dflop.plan.simulation import draw_batches, simulate
from hf_dflop.plan.trace_events import chrome_trace, recorded_events, simulated_events
from tests.unit.plan import example


def test_a_simulation_adds_up() -> None:
    told = []
    simulation = hf_dflop.simulate(example.plan(), example.shapes(), example.cost(), num_steps=3, progress=told.append)
    assert told == [1, 2, 3]
    summed = simulation.to_dict()
    assert summed["step_s"]["mean"] == pytest.approx(np.mean(summed["step_s"]["all"]))
    assert summed["step_s"]["mean_low"] <= summed["step_s"]["mean"] <= summed["step_s"]["mean_high"]
    assert [rank["rank"] for rank in summed["ranks"]] == list(range(8))
    for rank in summed["ranks"]:
        assert rank["busy_s"] + sum(rank["idle_s"][c] for c in CAUSES) == pytest.approx(simulation.mean_s)
    assert "LLM 1, replica 2" in simulation.summary()
    again = simulate(example.plan(), example.shapes(), example.cost(), num_steps=3)
    assert again.step_s.tolist() == simulation.step_s.tolist()


def test_batches_are_drawn_as_epochs_do() -> None:
    batches = list(draw_batches(10, 4, 3, seed=0))
    assert len(set(batches[0]) | set(batches[1])) == 8
    assert set(batches[2]) != set(batches[0]) or batches[2].tolist() != batches[0].tolist()
    with pytest.raises(PlanError, match="fewer than a global batch of 11"):
        next(draw_batches(10, 11, 1, seed=0))


def test_bad_input() -> None:
    with pytest.raises(PlanError, match="no global_batch_size"):
        simulate(example.plan(global_batch_size=None), example.shapes(), example.cost())
    with pytest.raises(PlanError, match="no samples to draw"):
        simulate(example.plan(), object(), example.cost())
    with pytest.raises(PlanError, match="at least one"):
        simulate(example.plan(), example.shapes(), example.cost(), num_steps=0)


def test_a_true_cost_model_needs_no_correction(tmp_path: Path) -> None:
    data = example.shapes()
    example.record_run(tmp_path, data, vision=1, llm=1, microbatch_s=0, noise=0)
    found = compare_run(example.replicated(), recorded_steps(tmp_path), data, example.cost(), optimizer_s=0.004)
    errors = {kind.kind: kind for kind in found.kinds}
    assert errors["microbatch"].error == pytest.approx(0, abs=1e-4)
    assert errors["optimizer"].ratio == pytest.approx(1, abs=1e-3)
    assert found.calibration.reduce_s == pytest.approx(0.02, abs=1e-4)
    assert errors["step"].measured_s - errors["step"].predicted_s == pytest.approx(
        0.03, abs=1e-3
    )  # data and reduction
    assert errors["step"].error_after == pytest.approx(0, abs=1e-4)


def test_a_wrong_cost_model_is_corrected(tmp_path: Path) -> None:
    data = example.shapes()
    example.record_run(tmp_path, data, vision=2, llm=0.7, microbatch_s=0.05, noise=0.02)
    plan, steps = example.replicated(), recorded_steps(tmp_path)
    found = compare_run(plan, steps, data, example.cost())
    errors = {kind.kind: kind for kind in found.kinds}
    assert errors["step"].error > 0.15
    assert errors["step"].error_after < 0.03
    assert found.helps
    fit = found.calibration
    assert fit.factors["vision forward"] == pytest.approx(2, rel=0.15)
    assert fit.factors["llm forward"] == pytest.approx(0.7, rel=0.15)
    corrected = compare_run(plan, steps, data, example.cost(), calibration=fit)
    assert next(k for k in corrected.kinds if k.kind == "step").error < 0.03
    perfect = compare_run(
        plan,
        steps[:1],
        data,
        example.cost(),
        calibration=compare_run(plan, steps[:1], data, example.cost()).calibration,
    )
    assert not perfect.helps, "nothing is left to gain"
    path = tmp_path / "calibration.json"
    fit.save(path)
    assert Calibration.load(path) == fit


def test_recorded_actions_are_compared_kind_by_kind(tmp_path: Path) -> None:
    """A pipeline that takes 1.5 times as long in every LLM backward, and else as predicted."""
    plan = example.plan(vision=ModulePlan(layers=(6,)), llm=ModulePlan(layers=(4, 4)), global_batch_size=12)
    data = example.shapes()
    simulation = simulate(plan, data, example.cost(), num_steps=6)
    lines: list[list[str]] = [[], [], []]
    for step, batch in enumerate(draw_batches(len(data), 12, 6, seed=0)):
        groups = plan_step(plan, example.cost(), data.select(batch), seed=step).groups
        samples = [batch[np.asarray(group)].tolist() for group in groups[0]]
        for rank in range(3):
            actions = [
                [
                    str(timed.action),
                    timed.start_s,
                    timed.start_s
                    + (timed.end_s - timed.start_s) * (1.5 if rank and timed.action.kind.value == "B" else 1),
                ]
                for timed in simulation.timelines[step].actions
                if timed.rank == rank
            ]
            end = simulation.timelines[step].step_s
            record = {"step": step, "begin_s": 0.0, "data_s": 0.0, "sync_end_s": end, "end_s": end}
            lines[rank].append(json.dumps(record | {"samples": samples, "actions": actions}) + "\n")
    for rank in range(3):
        (tmp_path / f"trace-rank{rank:05d}.jsonl").write_text("".join(lines[rank]))
    found = compare_run(plan, recorded_steps(tmp_path, skip_steps=0), data, example.cost())
    ratios = {kind.kind: kind.ratio for kind in found.kinds if kind.kind in ACTION_KINDS}
    assert ratios == pytest.approx({kind: 1.5 if kind == "llm backward" else 1.0 for kind in ACTION_KINDS})
    assert found.calibration.factors["llm backward"] == pytest.approx(1.5)
    assert all(kind.error_after < 1e-6 for kind in found.kinds if kind.kind in ACTION_KINDS)


def test_runs_that_are_not_the_plans(tmp_path: Path) -> None:
    data, cost = example.shapes(), example.cost()
    with pytest.raises(DatasetError, match="no trace-rank"):
        recorded_steps(tmp_path)
    example.record_run(tmp_path, data, vision=1, llm=1, microbatch_s=0, noise=0)
    steps = recorded_steps(tmp_path)
    assert len(steps) == 9, "warm-up is left out"
    with pytest.raises(DatasetError, match="the run has 2 ranks, the plan 8"):
        compare_run(example.plan(), steps, data, cost)
    with pytest.raises(DatasetError, match="ran 4 microbatches, the plan has 2"):
        compare_run(example.replicated(num_microbatches=2), steps, data, cost)
    with pytest.raises(DatasetError, match="another dataset"):
        compare_run(example.replicated(), steps, example.shapes(20), cost)
    (tmp_path / "trace-rank00000.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DatasetError, match="not readable"):
        recorded_steps(tmp_path)


def test_a_pipelines_waits_sends_and_sums(tmp_path: Path) -> None:
    """Kept apart from actions, drawn one after the other, on clocks that are set by where the ranks met."""
    for rank, late in enumerate((0.0, 50.0)):
        line = {
            "trace_version": 2,
            "step": 0,
            "begin_s": 1.0 + late,
            "data_s": 0.5,
            "slot_end_s": [],
            "actions": [["1F0", 2.0 + late, 3.0 + late]],
            "waits": [["1F0", 1.0 + late, 2.0 + late]],
            "sends": [["1F0", 3.0 + late, 3.25 + late]],
            "sum_s": [4.0 + late, 5.0 + late],
            "meet_s": 6.0 + late,
            "sync_end_s": 6.5 + late + rank,
            "end_s": 8.0 + late,
            "host": f"machine{rank}",
            "samples": [[0]],
        }
        (tmp_path / f"trace-rank{rank:05d}.jsonl").write_text(json.dumps(line) + "\n")
    (step,) = recorded_steps(tmp_path)
    first, second = step.ranks
    assert (second.waits, second.sends, second.sum_s) == (first.waits, first.sends, first.sum_s)
    assert second.sync_end_s == pytest.approx(first.sync_end_s + 1)
    events = [(e.name, e.category, e.start_s, e.duration_s) for e in recorded_events([step]) if e.rank == 0]
    assert sorted(events, key=lambda event: event[2]) == [
        ("data", "data", 0.0, 0.5),
        ("wait for 1F0", "wait", 0.5, 1.0),
        ("1F0", "forward", 1.5, 1.0),
        ("send 1F0", "send", 2.5, 0.25),
        ("sum gradients", "reduce", 3.5, 1.0),
        ("reduce and wait", "reduce", 4.5, 1.5),
        ("optimizer", "optimizer", 6.0, 1.5),
    ]
    newer = json.loads((tmp_path / "trace-rank00000.jsonl").read_text()) | {"trace_version": 3}
    (tmp_path / "trace-rank00000.jsonl").write_text(json.dumps(newer) + "\n")
    with pytest.raises(DatasetError, match="version 3; hf_dflop here reads up to 2"):
        recorded_steps(tmp_path)


def test_clocks_of_machines_are_aligned(tmp_path: Path) -> None:
    example.record_run(tmp_path, example.shapes(), vision=1, llm=1, microbatch_s=0, noise=0)
    for step in recorded_steps(tmp_path):
        assert step.ranks[0].sync_end_s == pytest.approx(step.ranks[1].sync_end_s)


def test_traces_and_page(tmp_path: Path) -> None:
    data, plan = example.shapes(), example.replicated()
    example.record_run(tmp_path, data, vision=1, llm=1, microbatch_s=0, noise=0)
    steps = recorded_steps(tmp_path)
    found = compare_run(plan, steps, data, example.cost())
    events = [*simulated_events(found.replayed), *recorded_events(steps, plan)]
    trace = chrome_trace(events)["traceEvents"]
    processes = [event["args"]["name"] for event in trace if event["name"] == "process_name"]
    assert sorted(processes) == [
        "recorded rank 0", "recorded rank 1", "simulated rank 0 (replica 0)", "simulated rank 1 (replica 1)",
    ]  # fmt: skip
    for pid in {event["pid"] for event in trace}:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace if e["ph"] == "X" and e["pid"] == pid)
        assert spans
        assert all(end <= start + 1 for (_, end), (start, _) in pairwise(spans)), "one at a time"
    page = timeline_page(found.replayed, recorded=steps, comparison=found, title="</script><b>")
    body = page.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    shown = json.loads(body.replace("<\\/", "</"))
    assert shown["title"] == "</script><b>"
    assert shown["rows"][:2] == ["rank 0: replica 0, simulated", "rank 0, recorded"]
    assert {event["step"] for event in shown["events"]} == set(range(8))
    assert shown["differences"][-1]["kind"] == "step"


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not a calibration"), ('{"schema_version": 9}', "schema version 9"), ("[]", "not a JSON object"),
     ('{"schema_version": 1, "factors": {"audio": 1}}', "names"),
     ('{"schema_version": 1, "speed": 2}', "not readable"),
     ('{"schema_version": 1, "microbatch_s": -1}', "finite and >= 0")],
)  # fmt: skip
def test_bad_calibrations(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(PlanError, match=says):
        Calibration.load(tmp_path / "c.json")


def test_simulating_needs_no_torch() -> None:
    code = (
        "import sys, hf_dflop; hf_dflop.simulate; import hf_dflop.cli.simulate, hf_dflop.plan.compare_run, "
        "hf_dflop.plan.page, hf_dflop.profile.report; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
