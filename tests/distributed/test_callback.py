"""The callback in a stock Trainer, on one and two processes."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("num_processes", [1, 2])
def test_balanced_training_takes_the_same_steps(num_processes: int) -> None:
    output = launch("tests.distributed.scripts.same_step", num_processes=num_processes)
    assert output.count("relative difference") == 4 * num_processes
    assert output.count("bare model refused") == (0 if num_processes == 1 else 2)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_cut_of_an_epoch_keeps_the_samples_of_a_step(num_processes: int) -> None:
    output = launch("tests.distributed.scripts.sampler_cases", num_processes=num_processes)
    assert output.count("ok resume") == 5 * num_processes
    assert output.count("ok grid") == 16 * num_processes
    assert output.count("ok refused hang") == (0 if num_processes == 1 else 2)


def test_trl_sft_trainer_takes_the_same_steps() -> None:
    output = launch("tests.distributed.scripts.sft", num_processes=2)
    assert output.count("sft relative difference") == 2


def test_microbatches_without_images_neither_hang_nor_change_the_steps(tmp_path: Path) -> None:
    script = "tests.distributed.scripts.image_free"
    launch(script, "save", str(tmp_path / "stock.pt"), num_processes=1, timeout_s=120)
    output = launch(script, "compare", str(tmp_path / "stock.pt"), num_processes=2, timeout_s=120)
    assert output.count("image free: ") == 2 * 8
