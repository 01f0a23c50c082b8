"""What the demo runs: sizes, arms, and the `TrainingArguments` of each arm."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_dflop.cost import CostModel
from hf_dflop.shapes import Shapes

__all__ = ["ARMS", "OWN_ARMS", "DemoSettings", "write_whole"]

ARMS: list[str] = ["stock", "balanced", "packed", "group_by_length", "batch_rebalance"]
"""Trainer's default sampler; with DflopCallback; packed too; and Trainer's two strategies that look at lengths."""
OWN_ARMS: list[str] = ["balanced", "packed"]
MIN_STEPS, MAX_STEPS = 3, 4
_ARM_TO_PACKED = 1.5
"""Seconds of the mean arm ÷ seconds of the packed one, as measured: padding and waiting."""


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, however the demo is interrupted."""
    draft = path.with_suffix(".part")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)


@dataclass(kw_only=True)
class DemoSettings:
    """Sizes of the demo; the same on every rank, kept as JSON beside the results."""

    output_dir: Path
    cache: Path
    num_ranks: int = 2
    batch_size: int = 8
    accumulation: int = 2
    num_steps: int | None = None
    """Optimizer steps of each run. None: as many as `budget_s` allows at this machine's pace, `MIN_STEPS` to
    `MAX_STEPS`; the first measurement decides, and what it decided is kept beside the results."""
    budget_s: float = 390.0
    """Seconds that all runs together may take."""
    num_rounds: int = 3
    num_calibration: int = 12
    num_eval_samples: int = 8
    learning_rate: float = 3e-4

    @property
    def samples_per_step(self) -> int:
        return self.accumulation * self.batch_size * self.num_ranks

    @property
    def num_samples(self) -> int:
        """Training samples: every arm sees each of them once."""
        assert self.num_steps is not None
        return self.num_steps * self.samples_per_step

    def paced(self, shapes: Shapes | None = None, cost_model: CostModel | None = None) -> "DemoSettings":
        """These settings with their number of steps: the given or the kept one, or else from the measured costs."""
        path = self.output_dir / "pace.json"
        if self.num_steps is not None:
            return self
        if not path.exists():
            assert shapes is not None
            assert cost_model is not None
            first = shapes.select(range(min(MAX_STEPS * self.samples_per_step, len(shapes))))
            # A microbatch's own overhead aside; the other arms are dearer than the packed one.
            run_s = _ARM_TO_PACKED * cost_model.sample_seconds(first).sum() / self.num_ranks / len(first)
            run_s *= self.samples_per_step * len(ARMS) * self.num_rounds
            write_whole(path, json.dumps({"num_steps": max(MIN_STEPS, min(MAX_STEPS, int(self.budget_s / run_s)))}))
        return replace(self, **json.loads(path.read_text(encoding="utf-8")))

    def training_arguments(self, arm: str) -> dict[str, Any]:
        """Keyword arguments for `TrainingArguments`: all arms but for the sampler alike."""
        strategy = "random" if arm in ("stock", *OWN_ARMS) else arm
        return {
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": self.accumulation,
            "num_train_epochs": 1,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "train_sampling_strategy": strategy,
            "length_column_name": "length",
            "remove_unused_columns": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
            "ddp_timeout": 600,
            "log_level": "error",
        }

    @staticmethod
    def lengths(dataset: Any) -> list[int]:
        """LLM tokens of each sample: what Trainer's length-aware strategies need to be told."""
        return Shapes.of_dataset(dataset).llm_tokens.tolist()

    def save(self, path: Path) -> None:
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write_whole(path, json.dumps(fields, indent=2))

    @classmethod
    def load(cls, path: Path) -> "DemoSettings":
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "output_dir": Path(fields["output_dir"]), "cache": Path(fields["cache"])})
