"""What the GPU topic runs: parts and sizes.

Depths are one fourteenth of a published pair, so that modules keep their proportions: an encoder with 2 of the 27
layers of SigLIP2 so400m (patches of 16, pictures of 512: 1,024 patches a tile), an LLM with 2 of the 28 layers of
Qwen2.5-7B, and a fourteenth of its vocabulary.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hf_dflop.data.by_sample import BY_SAMPLE
from recipes.demo.settings import write_whole

__all__ = ["ENGINE_ARMS", "MIX_NAMES", "PARTS", "GpuSettings", "tiny"]

PARTS: dict[str, str] = {
    "curves": "seconds of encoder, connector, LLM and head over sizes; the error on sizes not fitted",
    "replay": "the microbatches of every sampler, rank after rank; predicted beside measured",
    "engine": "two stages on one device: torch's engine, ours, the unsplit model",
}
"""What is measured, in this order."""

MIX_NAMES = ("onevision", "chart_doc")

ENGINE_ARMS: dict[str, str] = {
    "unsplit": "the unsplit model, microbatch after microbatch",
    "torch": "torch `ScheduleInterleaved1F1B`, two local stages",
    "hf_dflop": "**hf_dflop**, colocated encoder and LLM",
}


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """Sizes; kept as JSON beside the finished parts, which hold for these settings alone."""

    device: str = "cuda"
    device_name: str = ""
    """Of the card: what one began is not gone on with on another."""
    dtype: str = "bfloat16"
    attention: str = BY_SAMPLE
    """Of the LLM. The curves are measured with `sdpa`, which is the same on whole rows."""
    is_tiny: bool = False
    """Narrow modules that show that the code runs, and nothing else; never saved as a result."""
    vision_layers: int = 2
    llm_layers: int = 2
    vocab_size: int = 10_880
    num_ranks: int = 8
    num_slots: int = 3
    num_steps: int = 2
    num_rounds: int = 2
    num_repeats: int = 2
    """Times that a rank's step is run; the shortest seconds of each microbatch are kept: the first run warms up."""
    batch_sizes: dict[str, int] = field(default_factory=lambda: {"onevision": 2, "chart_doc": 3})
    """Samples of a stock microbatch, by mix."""
    max_tiles: dict[str, int] = field(default_factory=lambda: {"onevision": 32, "chart_doc": 5})
    """Most tiles of a sample; these are the most that the mixes have."""
    max_tokens: int = 16_384
    max_patches: int = 65_536
    """Largest microbatches that the curves are measured on."""
    curve_points: int = 10
    curve_held_out: int = 12
    curve_budget_s: float = 10.0
    engine_microbatches: int = 8
    engine_samples: int = 2
    engine_tiles: int = 3
    engine_text_tokens: int = 128
    engine_rounds: int = 9
    seed: int = 7

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> "GpuSettings":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def tiny(settings: GpuSettings) -> GpuSettings:
    """The same parts in seconds on a CPU."""
    return replace(
        settings,
        is_tiny=True,
        vision_layers=2,
        llm_layers=2,
        vocab_size=128,
        num_ranks=2,
        num_slots=2,
        num_steps=1,
        num_rounds=1,
        num_repeats=1,
        batch_sizes=dict.fromkeys(MIX_NAMES, 2),
        max_tiles=dict.fromkeys(MIX_NAMES, 3),
        max_tokens=256,
        max_patches=256,
        curve_points=4,
        curve_held_out=1,
        curve_budget_s=0.1,
        engine_microbatches=3,
        engine_tiles=1,
        engine_text_tokens=16,
        engine_rounds=2,
    )
