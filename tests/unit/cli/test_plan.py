"""`hf-dflop plan` as a user calls it."""

import json

import pytest
from typer.testing import CliRunner

from hf_dflop import DatasetProfile
from hf_dflop.cli.app import app
from hf_dflop.errors import PlanError
from hf_dflop.plan.plan import Plan
from tests.unit.plan.planning import mixture, small_spec
from tests.unit.profile.undrawn import undrawn

RUN = ["plan", "--global-batch-size", "16", "--gpus-per-node", "2", "--gpu", "A10-24GB"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    with undrawn():
        DatasetProfile.from_shapes(mixture(0), spec=small_spec()).save(folder)
    return str(folder)


def test_it_prints_and_writes(profile, tmp_path) -> None:
    output = tmp_path / "plan.json"
    found = CliRunner().invoke(
        app, [*RUN, "--profile", profile, "-o", str(output), "-c", "llm.tp<=1", "--price", "3", "--what-if"]
    )
    assert found.exit_code == 0, found.output
    assert "Best on 2 GPUs (1 × 2 A10-24GB)" in found.output
    assert "GPU-hours" in found.output
    assert "one node more" in found.output
    assert Plan.load(output).llm.tp == 1


def test_json_and_presets(profile) -> None:
    found = CliRunner().invoke(app, [*RUN, "--profile", profile, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["plan"]["global_batch_size"] == 16
    assert "H200-141GB" in CliRunner().invoke(app, [*RUN[:3], "--profile", profile, "--gpu", "list"]).output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "H1000"], "no GPU preset"),
        (["-c", "llm.tp=1"], "is not a constraint"),
        (["--cluster", "nowhere.json"], "is not a file"),
        (["-o", "/nowhere/plan.json"], "cannot be written"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(profile, more, message) -> None:
    found = CliRunner().invoke(app, [*RUN, "--profile", profile, *more])
    assert isinstance(found.exception, PlanError)
    assert message in str(found.exception)


def test_a_simulation_takes_the_plans_cluster(profile, tmp_path) -> None:
    output = tmp_path / "plan.json"
    assert CliRunner().invoke(app, [*RUN, "--profile", profile, "-o", str(output)]).exit_code == 0
    found = CliRunner().invoke(
        app, ["simulate", "--plan", str(output), "--profile", profile, "--steps", "12", "--json"]
    )
    assert found.exit_code == 0, found.output
    planned = json.loads(output.read_text())["expected"]["step_s"]
    simulated = json.loads(found.stdout)["step_s"]["mean"]
    assert simulated == pytest.approx(planned, rel=0.25)  # other batches, and no optimizer
