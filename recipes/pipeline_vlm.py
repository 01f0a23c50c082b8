"""Train a vision-language model through the pipeline of a plan.

    # one node, seven devices, as the plan says
    torchrun --nproc_per_node 7 recipes/pipeline_vlm.py --plan plan.json --model MODEL --dataset DATASET --bf16

    # two CPU processes on the demo's model and documents: the encoder on one, the LLM on the other
    torchrun --nproc_per_node 2 recipes/pipeline_vlm.py --use_cpu --max_steps 10

`hf-dflop plan` makes a plan. Without `--plan`, the encoder gets the first process and every other one a stage of the
LLM. Flags are those of finetune_vlm.py; `--balance off` keeps the stock grouping. Samples per microbatch follow from
the plan's global_batch_size, or are `--per_device_train_batch_size`. `--freeze` is the plan's `frozen`.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, HfArgumentParser, TrainingArguments

sys.path.append(str(Path(__file__).resolve().parents[1]))  # launched as a script, this folder is on the path alone

import hf_dflop
from hf_dflop.plan import ModulePlan, Plan
from recipes import finetune_vlm

MICROBATCHES = 4


@dataclass(kw_only=True)
class PipelineArguments:
    """What this recipe adds to the flags of finetune_vlm.py."""

    plan: str | None = field(default=None, metadata={"help": "JSON of a plan, as `hf-dflop plan` writes it."})


def default_plan(config: Any, processes: int) -> Plan:
    """The encoder on the first process, the LLM's layers spread evenly over the others."""
    if processes < 2:
        raise SystemExit("a pipeline needs two processes or more: launch with torchrun --nproc_per_node 2")
    layers, stages = config.get_text_config().num_hidden_layers, processes - 1
    spread = tuple(layers // stages + (stage < layers % stages) for stage in range(stages))
    encoder = int(getattr(config.vision_config, "num_hidden_layers", None) or 1)
    return Plan(vision=ModulePlan(layers=(encoder,)), llm=ModulePlan(layers=spread), num_microbatches=MICROBATCHES)


def frame(weights: str, recipe: finetune_vlm.RecipeArguments) -> Any:
    """The model without its weights: each process reads its own share of them."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(weights))


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    (own, rest) = HfArgumentParser(PipelineArguments).parse_args_into_dataclasses(
        arguments, return_remaining_strings=True
    )
    recipe, training = finetune_vlm.parse(rest)
    logging.basicConfig(level=logging.INFO if training.process_index == 0 else logging.WARNING)
    if recipe.freeze:
        raise SystemExit('--freeze: put "vision", "connector" or "llm" into the plan\'s `frozen`.')
    ingredients = finetune_vlm.prepare(recipe, training, frame)
    plan = Plan.load(own.plan) if own.plan else default_plan(ingredients.model.config, training.world_size)
    plan = replace(plan, balance=plan.balance and recipe.balance == "on")
    training.gradient_accumulation_steps = plan.num_microbatches
    if plan.global_batch_size is not None:
        training.per_device_train_batch_size = plan.global_batch_size // (plan.num_microbatches * plan.llm.dp)
    collator: Any = ingredients.collator
    if recipe.packing == "on":
        collator = hf_dflop.PackedCollator(collator, ingredients.model)
    pipe = hf_dflop.PipelineModel.from_pretrained(
        ingredients.weights,
        plan=plan,
        device=training.device,
        autocast=torch.bfloat16 if training.bf16 else None,
        dtype=recipe.dtype,
    )
    trainer = hf_dflop.DflopTrainer(
        pipe,
        training,
        collator,
        train_dataset=ingredients.train,
        eval_dataset=annotated(recipe, training, ingredients),
        processing_class=ingredients.processor,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.end_training()


def annotated(recipe: Any, training: TrainingArguments, ingredients: Any) -> Any:
    """The rows to evaluate on, with shape columns."""
    if ingredients.evaluation is None:
        return None
    with training.main_process_first(desc="annotating the evaluation rows"):
        rows, _ = hf_dflop.profile_dataset(
            ingredients.evaluation,
            ingredients.processor,
            labels=recipe.labels,
            max_length=recipe.max_length,
            num_proc=recipe.profile_workers,
        )
    return rows


if __name__ == "__main__":
    main()
