"""The recipe under `accelerate launch`, on two processes, from a model and dataset of a Hub to a stock checkpoint."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Image, List, load_from_disk

from tests.distributed.launch import PYTHONPATH, ROOT, launch
from tests.unit.profile.hub import hub, hub_environment

pytestmark = pytest.mark.distributed


def _launch(arguments: list[str], *, num_processes: int, hub: dict[str, str] | None = None) -> str:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *(["--multi_gpu"] if num_processes > 1 else ["--cpu"]),
        "--num_machines", "1", "--num_processes", str(num_processes), "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", "0",
        "recipes/finetune_vlm.py", *arguments,
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": PYTHONPATH}
    environment = (offline if hub is None else hub) | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-5000:]
    return finished.stdout


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    from tests.distributed.chats import chat_processor, conversations, model

    folder = tmp_path_factory.mktemp("recipe")
    processor = chat_processor()
    model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    conversations(24).train_test_split(test_size=4, seed=0).save_to_disk(str(folder / "data"))
    return str(folder / "model"), str(folder / "data")


def _as_cauldron(rows: Dataset) -> bytes:
    """Chats as a parquet file of columns `images` and `texts`."""
    found: dict[str, list[Any]] = {"images": [], "texts": []}
    for row in rows.cast_column("images", List(Image(decode=False))):
        asked, answered = (" ".join(part["text"] or "" for part in m["content"]).strip() for m in row["messages"])
        found["images"].append(row["images"])
        found["texts"].append([{"user": asked, "assistant": answered, "source": "AI2D"}])
    file = BytesIO()
    Dataset.from_dict(found).cast_column("images", List(Image())).to_parquet(file)
    return file.getvalue()


def test_the_shipped_config_trains_on_two_processes_what_the_hub_has(
    ingredients: tuple[str, str], tmp_path: Path
) -> None:
    """Model and dataset by their ids, from a local server; a tiny LLaVA in the place of the model of that name."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, data = ingredients
    config = ROOT / "recipes/configs/onevision_cauldron.yaml"
    named = yaml.safe_load(config.read_text())
    part = named["dataset_name"]
    files = {f"{part}/{split}-0.parquet": _as_cauldron(rows) for split, rows in load_from_disk(data).items()}
    splits = "".join(f"  - split: {split}\n    path: {part}/{split}-*\n" for split in ("train", "test"))
    files["README.md"] = f"---\nconfigs:\n- config_name: {part}\n  data_files:\n{splits}---\n".encode()
    weights = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    with hub(named["dataset"], files, models={named["model"]: weights}) as (endpoint, asked):
        output = _launch(
            ["--config", str(config), "--use_cpu", "--bf16", "false", "--freeze", "embeddings", "--eval_split", "test",
             "--max_steps", "3", "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--save_steps", "3",
             "--learning_rate", "1e-3", "--warmup_steps", "0", "--dataloader_num_workers", "0",
             "--trace_dir", str(tmp_path / "trace"), "--output_dir", str(tmp_path / "out"), "--expect_processes", "2"],
            num_processes=2,
            hub=hub_environment(endpoint, tmp_path / "home"),
        )  # fmt: skip
    for kind, name in (("", named["model"]), ("/datasets", named["dataset"])):
        assert any(f"GET {kind}/{name}/resolve/" in line for line in asked), asked[-20:]
    assert "20 samples" in output
    history = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "dflop/idle_s_rank1" in log] == [1, 2, 3]
    assert history[0]["step"] == 0
    assert 0 <= history[0]["eval_token_accuracy"] <= 1
    assert len(list((tmp_path / "trace").iterdir())) == 2
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    original = AutoModelForImageTextToText.from_pretrained(model)
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.vocab_size
    frozen, trained = (
        (saved.get_input_embeddings().weight == original.get_input_embeddings().weight).all(),
        (
            saved.model.multi_modal_projector.linear_1.weight == original.model.multi_modal_projector.linear_1.weight
        ).all(),
    )
    assert frozen
    assert not trained


def test_it_refuses_to_run_on_fewer_processes_than_expected(ingredients: tuple[str, str], tmp_path: Path) -> None:
    model, data = ingredients
    arguments = ["--model", model, "--dataset", data, "--use_cpu", "--expect_processes", "2", "--output_dir"]
    with pytest.raises(AssertionError, match=r"failed:\n(?s:.*)--expect_processes 2, but 1 started"):
        launch("recipes.finetune_vlm", *arguments, str(tmp_path), num_processes=0)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_begins_with_the_weights_of_its_checkpoint(ingredients: tuple[str, str], tmp_path: Path) -> None:
    """Trainer alone would go on from those of `--model`: it misses weights that are saved under other names."""
    import torch
    from transformers import AutoModelForImageTextToText, TrainingArguments

    from recipes import finetune_vlm

    model, data = ingredients
    trained = AutoModelForImageTextToText.from_pretrained(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    trained.save_pretrained(tmp_path / "checkpoint-3")
    training = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    recipe = finetune_vlm.RecipeArguments(model=model, dataset=data, dtype="float32")
    resumed = dict(finetune_vlm.prepare(recipe, training).model.named_parameters())
    assert all(torch.equal(resumed[name], parameter) for name, parameter in trained.named_parameters())
