"""Model, rows and batches that every part of the topic shares, and a clock for steps of all processes.

In: settings. Out: `Ingredients`: a fresh copy of the model whenever asked for, annotated rows, global batches, and any
grouping of a global batch as the inputs of this process.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import hf_dflop
from hf_dflop.cost import ModelSpec
from hf_dflop.integrations.pipeline_data import Slot, SlotRows, join_slots
from hf_dflop.pipeline import PipelineModel, StepBatch
from hf_dflop.shapes import Shapes
from recipes.benchmarks.pipeline.settings import PipelineSettings

__all__ = ["Ingredients", "prepare", "say", "slowest"]

_DRAWN = 5
"""Documents looked at for each that is kept."""

Groups = Sequence[Sequence[Any]]
"""LLM replica -> microbatch -> places of samples in a global batch."""


@dataclass(kw_only=True)
class Ingredients:
    """What is trained on what."""

    settings: PipelineSettings
    master: Any
    collator: Any
    rows: Any
    profile: hf_dflop.DatasetProfile
    shapes: Shapes
    spec: ModelSpec
    batches: list[np.ndarray]
    """Dataset indices of the global batches that are measured."""
    calibration: np.ndarray
    """The same of the one that predictions are calibrated on."""

    def model(self) -> Any:
        """A fresh copy."""
        return copy.deepcopy(self.master).train()

    def label_tokens(self, batch: np.ndarray) -> int:
        return int(self.shapes.label_tokens[batch].sum())

    def inputs(self, pipe: PipelineModel, batch: np.ndarray, groups: Groups) -> StepBatch:
        """This process's inputs of a step."""
        slots = SlotRows(self.rows, self.shapes, self.collator, pipe.topology, pipe.place.rank)
        tokens = self.label_tokens(batch)
        return join_slots(
            [
                slots[
                    Slot(
                        samples=tuple(
                            tuple(int(i) for i in batch[np.asarray(parts[m], dtype=np.int64)]) for parts in groups
                        ),
                        label_tokens=tokens,
                    )
                ]
                for m in range(len(groups[0]))
            ]
        )


def prepare(settings: PipelineSettings) -> Ingredients:
    """Load what the runner has made ready, the same on both processes."""
    from datasets import load_from_disk
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from recipes.demo.documents import FOLDER

    folder = settings.cache / model_folder(settings)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rows = load_from_disk(str(settings.cache / FOLDER))["train"]
    count = settings.batch_samples * (settings.num_batches + 1)
    drawn = rows.shuffle(seed=settings.seed).select(range(min(len(rows), _DRAWN * count)))
    annotated, _ = hf_dflop.profile_dataset(drawn, processor, config=model.config)
    short = np.flatnonzero(Shapes.of_dataset(annotated).llm_tokens <= settings.max_tokens)[:count]
    if len(short) < count:
        raise SystemExit(f"{len(short)} documents have {settings.max_tokens} tokens at most; {count} are needed.")
    annotated, profile = hf_dflop.profile_dataset(drawn.select(short), processor, config=model.config)
    parts = np.arange(count).reshape(settings.num_batches + 1, settings.batch_samples)
    return Ingredients(
        settings=settings,
        master=model,
        collator=hf_dflop.VisionLanguageCollator(processor),
        rows=annotated,
        profile=profile,
        shapes=Shapes.of_dataset(annotated),
        spec=ModelSpec.from_config(model.config),
        batches=list(parts[1:]),
        calibration=parts[0],
    )


def model_folder(settings: PipelineSettings) -> str:
    """Name of the checkpoint's folder in the cache."""
    return f"model-{settings.vision_layers}-{settings.vocab_size}"


def slowest(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds from the moment that all processes are there until the last one has done `run`; and what it gave."""
    dist.barrier()
    begin = time.perf_counter()
    found = run()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds), found


def say(text: str) -> None:
    """A line of progress, from one process."""
    if dist.get_rank() == 0:
        print(f"[bench] pipeline: {text}", flush=True)
