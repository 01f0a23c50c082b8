"""Fine-tune a vision-language model with balanced microbatches, on any number of devices.

    # one node, all devices
    accelerate launch recipes/finetune_vlm.py --config recipes/configs/onevision_cauldron.yaml

    # two CPU processes: accelerate starts two only when it is told that it has several devices
    accelerate launch --multi_gpu --num_processes 2 recipes/finetune_vlm.py --use_cpu --expect_processes 2 \\
        --balance on --max_steps 10

Samples of a microbatch are joined into one row without padding, after a check on the model itself that none sees
another; `--packing off` pads them instead. `--balance off` trains the same steps with the stock grouping, and still
measures how long ranks wait. Every flag of `transformers.TrainingArguments` can be given; `--config FILE.yaml` holds
flags that the command line overrides. Without `--model` and `--dataset` the demo's own small model and documents are
fetched and used.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments
from transformers.utils import ModelOutput

import hf_dflop
from hf_dflop import metrics
from hf_dflop.cost import CostModel

logger = logging.getLogger(__name__)
_DEMO = "demo"


@dataclass(kw_only=True)
class RecipeArguments:
    """What this recipe adds to `TrainingArguments`."""

    model: str = field(default=_DEMO, metadata={"help": "Hub id or local folder of a model and its processor."})
    dataset: str = field(default=_DEMO, metadata={"help": "Hub id, local folder or file of the dataset."})
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset, e.g. ai2d."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, before and after."})
    max_samples: int | None = field(default=None, metadata={"help": "Train on the first N samples only."})
    balance: str = field(
        default="on",
        metadata={
            "help": "on: balance microbatches. off: keep the stock grouping, and only measure.",
            "choices": ["on", "off"],
        },
    )
    packing: str = field(
        default="on",
        metadata={
            "help": "on: join the samples of a microbatch into one row; refused where the model does not keep them "
            "apart. off: pad them to the longest.",
            "choices": ["on", "off"],
        },
    )
    labels: str = field(
        default="assistant",
        metadata={"help": "Which tokens are learned.", "choices": ["assistant", "all"]},
    )
    max_length: int | None = field(default=None, metadata={"help": "Cut a sample's text after so many tokens."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Do not train these.", "choices": ["vision", "embeddings"], "nargs": "*"},
    )
    dtype: str = field(default="auto", metadata={"help": "Load the weights as auto, float32, bfloat16, ..."})
    profile_workers: int | None = field(default=None, metadata={"help": "Processes that annotate the dataset."})
    cost_model: str | None = field(default=None, metadata={"help": "JSON of a measured CostModel."})
    trace_dir: str | None = field(default=None, metadata={"help": "Record every step of every rank there."})
    expect_processes: int | None = field(
        default=None, metadata={"help": "Stop unless so many processes really started."}
    )
    demo_cache: str = field(default=".cache/demo", metadata={"help": "Where the demo's assets are kept."})


@dataclass(kw_only=True)
class Ingredients:
    """Everything that a run needs and that does not depend on how it is grouped."""

    model: Any
    processor: Any
    collator: hf_dflop.VisionLanguageCollator
    train: Dataset
    evaluation: Dataset | None
    profile: hf_dflop.DatasetProfile
    weights: str = ""
    """Hub id or folder of the model."""


def load_model(weights: str, recipe: RecipeArguments) -> Any:
    """The model of a Hub id or folder."""
    return AutoModelForImageTextToText.from_pretrained(weights, dtype=recipe.dtype)


def prepare(
    recipe: RecipeArguments, training: TrainingArguments, load: Callable[[str, RecipeArguments], Any] = load_model
) -> Ingredients:
    """Load the model, annotate the dataset (once, on the first process of each node), build the collator."""
    model_path, dataset = recipe.model, recipe.dataset
    if _DEMO in (recipe.model, recipe.dataset):
        # Launched as a script, this folder is on the path and not the one above it.
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from recipes import demo

        with training.main_process_first(desc="fetching the demo's model and documents"):
            found = demo.prepare(Path(recipe.demo_cache))
        model_path = str(found.model_path) if recipe.model == _DEMO else recipe.model
        dataset = str(found.dataset_path) if recipe.dataset == _DEMO else recipe.dataset
    with training.main_process_first(desc="loading the model"):
        # Trainer restores weights by name, and misses those of models that save under other names than they train.
        weights = training.resume_from_checkpoint or model_path
        model = load(weights, recipe)
        processor = AutoProcessor.from_pretrained(model_path)
    if "vision" in recipe.freeze:
        _vision_encoder(model).requires_grad_(False)
    if "embeddings" in recipe.freeze:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    rows = _load(dataset, recipe)
    train = rows[recipe.train_split]
    if recipe.max_samples is not None:
        train = train.select(range(min(recipe.max_samples, len(train))))
    with training.main_process_first(desc="annotating the dataset"):
        annotated, profile = hf_dflop.profile_dataset(
            train,
            processor,
            config=model.config,
            labels=recipe.labels,
            max_length=recipe.max_length,
            num_proc=recipe.profile_workers,
        )
    collator = hf_dflop.VisionLanguageCollator(processor, labels=recipe.labels, max_length=recipe.max_length)
    evaluation = rows[recipe.eval_split] if recipe.eval_split is not None else None
    return Ingredients(
        model=model,
        processor=processor,
        collator=collator,
        train=annotated,
        evaluation=evaluation,
        profile=profile,
        weights=str(weights),
    )


def build_trainer(recipe: RecipeArguments, training: TrainingArguments, ingredients: Ingredients) -> Trainer:
    """A `Trainer` as it comes, but for the callback and, with packing, the collator of the training."""
    cost_model = CostModel.load(recipe.cost_model) if recipe.cost_model is not None else None
    callback = hf_dflop.DflopCallback(
        ingredients.train, balance=recipe.balance == "on", cost_model=cost_model, trace_dir=recipe.trace_dir
    )
    collator: Any = ingredients.collator
    if recipe.packing == "on":
        hf_dflop.attend_by_sample(ingredients.model)  # where no FlashAttention was asked for
        collator = hf_dflop.PackedCollator(collator, ingredients.model)
    return Trainer(
        model=ingredients.model,
        args=training,
        train_dataset=ingredients.train,
        eval_dataset=ingredients.evaluation,
        data_collator=collator,
        processing_class=ingredients.processor,
        compute_metrics=token_metrics if ingredients.evaluation is not None else None,
        preprocess_logits_for_metrics=shrink_logits,
        callbacks=[callback],
    )


def outputs_but_logits(model: Any) -> list[str]:
    """Names of the model's outputs that an evaluation must not gather.

    A rank whose batch has no image returns none of some of them, and all ranks would wait for ever. They are the
    fields of the output classes beside the model's own class, whatever this version of transformers calls them.
    """
    kinds = vars(sys.modules[type(model).__module__]).values()
    outputs = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ModelOutput)]
    names = {f.name for kind in outputs if is_dataclass(kind) for f in fields(kind)}
    return sorted(names - {"loss", "logits"})


def shrink_logits(logits: Any, labels: Any) -> Any:
    """Logits `(rows, length, vocab)` → the predicted id and the NLL of the label at each position but the last."""
    import torch

    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    targets = labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return logits.argmax(-1), nll


def token_metrics(prediction: Any) -> dict[str, float]:
    """Token accuracy and perplexity of an evaluation, with `evaluate`."""
    ids, nll = prediction.predictions
    references = prediction.label_ids[:, 1:].reshape(-1)
    accuracy = metrics.load("token_accuracy").compute(predictions=ids.reshape(-1), references=references)
    perplexity = metrics.load("token_perplexity").compute(predictions=nll.reshape(-1), references=references)
    return {
        "token_accuracy": accuracy["token_accuracy"],
        "token_perplexity": perplexity["token_perplexity"],
    }


def _vision_encoder(model: Any) -> Any:
    return model.get_encoder(modality="image")


def _load(dataset: str, recipe: RecipeArguments) -> Any:
    import datasets

    path = Path(dataset)
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(dataset)
    if (path / "state.json").exists():
        return DatasetDict({recipe.train_split: datasets.load_from_disk(dataset)})
    return datasets.load_dataset(dataset, recipe.dataset_name)


def parse(arguments: list[str]) -> tuple[RecipeArguments, TrainingArguments]:
    """Command line → arguments; the flags of `--config FILE.yaml` come first, so that others override them."""
    arguments = list(arguments)
    if "--config" in arguments:
        at = arguments.index("--config")
        with open(arguments[at + 1], encoding="utf-8") as file:
            flags = yaml.safe_load(file)
        del arguments[at : at + 2]
        given = []
        for name, value in flags.items():
            given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        arguments = given + arguments
    if not any(argument.startswith("--output_dir") for argument in arguments):
        arguments += ["--output_dir", "out/finetune"]
    parser = HfArgumentParser((RecipeArguments, TrainingArguments), description=__doc__.split("\n\n")[0])
    recipe, training = parser.parse_args_into_dataclasses(arguments)
    # The collator needs the raw columns; Trainer would drop whatever the model's forward does not name.
    training.remove_unused_columns = False
    return recipe, training


def main(arguments: list[str] | None = None) -> None:
    recipe, training = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO if training.process_index == 0 else logging.WARNING)
    if recipe.expect_processes not in (None, training.world_size):
        raise SystemExit(
            f"--expect_processes {recipe.expect_processes}, but {training.world_size} started. On CPU, launch with "
            "`accelerate launch --multi_gpu --num_processes N`, and give the script --use_cpu."
        )
    ingredients = prepare(recipe, training)
    if training.process_index == 0:
        print(ingredients.profile.summary())
    # Not `trainer.evaluate()` before training: it would leave the model without DDP.
    training.eval_on_start = ingredients.evaluation is not None
    trainer = build_trainer(recipe, training, ingredients)
    ignored = outputs_but_logits(ingredients.model)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint, ignore_keys_for_eval=ignored)
    if ingredients.evaluation is not None:
        trainer.log_metrics("after", trainer.evaluate(metric_key_prefix="after", ignore_keys=ignored))
    trainer.save_model()
    if trainer.is_world_process_zero():
        ingredients.processor.save_pretrained(training.output_dir)
    # A process that ends while another still talks to it takes that one down.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
