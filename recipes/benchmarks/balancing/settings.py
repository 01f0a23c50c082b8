"""What the balancing topic runs: mixes, arms, sizes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.demo.settings import DemoSettings, write_whole

__all__ = ["ARMS", "MAX_TILES", "MIXES", "SAMPLERS", "Arm", "BalancingSettings", "rotated"]

MIXES: dict[str, str] = {
    "documents": "real: sections of the GIMP manual with their screenshots",
    "onevision": "synthetic: shares and tiles of the LLaVA-OneVision stage",
    "chart_doc": "synthetic: ai2d, chartqa, docvqa, synthdog by their published moments",
}
"""Data mixes and what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A sampler with a collator."""

    sampler: str
    packed: bool

    @property
    def name(self) -> str:
        return f"{self.sampler}{'+packed' if self.packed else ''}"


SAMPLERS: dict[str, str] = {
    "stock": "stock random",
    "group_by_length": "group_by_length",
    "batch_rebalance": "batch_rebalance",
    "llm_lpt": "LPT on LLM cost",
    "omnibal": "OmniBal (ISF)",
    "visual_sorted": "NeMo-style visual-sorted packs",
    "hf_dflop": "**hf_dflop**",
}
"""Samplers and how the page calls them."""

ARMS: list[Arm] = [Arm(sampler=sampler, packed=packed) for packed in (False, True) for sampler in SAMPLERS]


def rotated(arms: list[Arm], turn: int, num_turns: int) -> list[Arm]:
    """The order of the arms in a turn: begins elsewhere in each, and neighbours change with its parity."""
    start = turn * len(arms) // max(num_turns, 1)
    order = arms[start:] + arms[:start]
    return order if turn % 2 == 0 else order[::-1]


@dataclass(kw_only=True)
class BalancingSettings:
    """Sizes; the same on every rank, kept as JSON beside the runs."""

    output_dir: Path
    cache: Path
    mix: str
    num_ranks: int = 2
    batch_size: int = 5
    accumulation: int = 3
    num_steps: int = 2
    num_rounds: int = 2
    num_repeats: int = 2
    num_calibration: int = 24
    num_eval_samples: int = 16
    seed: int = 7

    @property
    def num_samples(self) -> int:
        """Training samples of a run: every arm sees each of them once; each round has its own."""
        return self.num_steps * self.accumulation * self.batch_size * self.num_ranks

    def training_arguments(self, arm: Arm) -> dict[str, Any]:
        """Keyword arguments for `TrainingArguments`: those of the demo, all arms but for the sampler alike."""
        own = arm.sampler in ("group_by_length", "batch_rebalance")
        demo = DemoSettings(
            output_dir=self.output_dir, cache=self.cache, batch_size=self.batch_size, accumulation=self.accumulation
        )
        return demo.training_arguments(arm.sampler if own else "stock") | {"seed": self.seed}

    def save(self, path: Path) -> None:
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write_whole(path, json.dumps(fields, indent=2))

    @classmethod
    def load(cls, path: Path) -> "BalancingSettings":
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "output_dir": Path(fields["output_dir"]), "cache": Path(fields["cache"])})


MAX_TILES: dict[str, int] = {"documents": 6, "onevision": 30, "chart_doc": 6}
"""Most tiles of one picture, without its overview tile."""
