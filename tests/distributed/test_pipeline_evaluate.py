"""Trainer over a pipeline: metrics and predictions, the best model at the end, the Hub."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed
SCRIPT = "tests.distributed.scripts.pipeline_evaluate"


def test_metrics_predictions_the_best_model_and_a_push_are_those_of_trainer(folder: Path) -> None:
    output = launch(SCRIPT, "run", str(folder), num_processes=3, timeout_s=180)
    assert "evaluate: pushed" in output
