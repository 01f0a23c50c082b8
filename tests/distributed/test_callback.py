"""The callback in a stock Trainer, on one and two processes."""

from pathlib import Path

import pytest

from tests.distributed.every_case import EVERY_CASE
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


def launch_and_resume(module: str, *arguments: str, num_processes: int, timeout_s: float = 240) -> str:
    """`launch`, where a stock Trainer can load an optimizer's state on several processes without a GPU."""
    try:
        return launch(module, *arguments, num_processes=num_processes, timeout_s=timeout_s)
    except AssertionError as error:
        if "_load_optimizer_and_scheduler" in str(error) and "tagged with cpu:" in str(error):
            pytest.skip("Trainer of this transformers loads no optimizer on several processes without a GPU")
        raise


@pytest.mark.parametrize("num_processes", [1, 2])
def test_balanced_training_takes_the_same_steps(num_processes: int) -> None:
    output = launch("tests.distributed.scripts.same_step", num_processes=num_processes)
    assert output.count("relative difference") == (4 if EVERY_CASE else 2) * num_processes
    assert output.count("bare model refused") == (0 if num_processes == 1 else 2)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_cut_of_an_epoch_keeps_the_samples_of_a_step(num_processes: int) -> None:
    output = launch("tests.distributed.scripts.sampler_cases", num_processes=num_processes)
    assert output.count("ok resume") == (5 if EVERY_CASE else 3) * num_processes
    assert output.count("ok grid") == (16 if EVERY_CASE else 5) * num_processes
    assert output.count("ok refused hang") == (0 if num_processes == 1 else 2)


def test_trl_sft_trainer_takes_the_same_steps() -> None:
    output = launch("tests.distributed.scripts.sft", num_processes=2)
    assert output.count("sft relative difference") == 4


def test_packed_and_balanced_training_takes_the_steps_of_padded_stock_training() -> None:
    output = launch("tests.distributed.scripts.packed", num_processes=2)
    assert output.count("packed relative difference") == 4


@pytest.mark.timeout(900 if EVERY_CASE else 300)
def test_balanced_runs_agree_with_stock_runs_in_every_parameter(tmp_path: Path) -> None:
    """DDP and a model sharded on loading, then FSDP2 through the same Trainer: all end as stock DDP does."""
    script, path = "tests.distributed.scripts.equal_runs", str(tmp_path / "stock.pt")
    timeout_s = 440 if EVERY_CASE else 240
    output = launch(script, "ddp", path, num_processes=2, timeout_s=timeout_s)
    assert (output.count("equal_runs ddp"), output.count("equal_runs loaded")) == (2 * (11 if EVERY_CASE else 5), 2)
    output = launch(script, "fsdp", path, num_processes=2, timeout_s=timeout_s)
    assert output.count("equal_runs fsdp") == 2 * (13 if EVERY_CASE else 4)


def test_resuming_goes_on_with_the_same_samples_on_another_number_of_ranks(tmp_path: Path) -> None:
    script = "tests.distributed.scripts.elastic"
    saved = launch_and_resume(script, "save", str(tmp_path), num_processes=2)
    assert (saved.count("ok stream"), saved.count("ok same ranks")) == (4, 4)
    resumed = launch(script, "resume", str(tmp_path), num_processes=1)
    assert (resumed.count("ok other ranks"), resumed.count("ok refused")) == (2, 1)


def test_microbatches_without_images_neither_hang_nor_change_the_steps(tmp_path: Path) -> None:
    script = "tests.distributed.scripts.image_free"
    # Without a rank: in one process, too, DDP refuses a parameter that got no gradient.
    launch(script, "save", str(tmp_path / "stock.pt"), num_processes=0)
    output = launch(script, "compare", str(tmp_path / "stock.pt"), num_processes=2, timeout_s=120)
    assert output.count("image free: ") == 2 * (8 if EVERY_CASE else 6)
    output = launch(script, "compare", str(tmp_path / "stock.pt"), num_processes=8)
    assert output.count("image free: one image for eight ranks") == 8


def test_a_dummy_image_keeps_sharded_ranks_together() -> None:
    script = "tests.distributed.scripts.sharded"
    assert launch(script, num_processes=2, timeout_s=60).count("sharded: ") == 2
    with pytest.raises(AssertionError, match=r"failed|hung"):  # the danger is real
        launch(script, "bare", num_processes=2, timeout_s=60)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_zero_takes_the_same_steps(stage: int, monkeypatch) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; it is optional, and not in the tests' needs")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    output = launch("tests.distributed.scripts.zero", str(stage), num_processes=2)
    assert output.count(f"zero {stage} relative difference") == 2


def test_costs_correct_themselves_and_slow_ranks_are_found() -> None:
    output = launch_and_resume("tests.distributed.scripts.correction", num_processes=2, timeout_s=200)
    for told in ("resumed between two versions", "wrong costs: ", "slow rank: "):
        assert output.count(told) == 2
    assert output.count("hf_dflop: rank 1 is slow: it takes 1.") >= 2
    assert "It gets less work from now on." in output
    assert "hf_dflop: cost version 1 holds from step " in output
    assert "waited for rank 1 in " in output  # the log line that names the straggler, its microbatch and samples
    assert "most beyond its prediction: step " in output


def test_balanced_training_on_sounds_takes_the_same_steps() -> None:
    """A model of sounds, one with a loss of its own, and one of images and sounds."""
    output = launch("tests.distributed.scripts.hearing", num_processes=2)
    assert output.count("hearing ") == 2 * (4 if EVERY_CASE else 3)
    assert output.count("mean loss refused") == 2
