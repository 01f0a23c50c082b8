"""What the pipeline topic runs: plans, arms, sizes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_dflop.plan import ModulePlan, Plan
from recipes.demo.model import DemoModelConfig
from recipes.demo.settings import write_whole

__all__ = ["ENGINE_ARMS", "GROUPINGS", "PADDING_ARMS", "PARTS", "PLANS", "PipelineSettings", "make_plan"]

PARTS: dict[str, str] = {
    "prediction": "six combinations of plan and grouping: predicted and measured seconds of a step",
    "engine": "microbatches of one shape through torch's engine and through ours",
    "padding": "the demo's documents: padded to the longest in torch's engine, ragged in ours, DDP, FSDP2",
}
"""What is measured, in this order."""

PLANS: dict[str, str] = {
    "vision / LLM": "the encoder on one process, the LLM on the other",
    "LLM / LLM": "the encoder with the LLM's first stage on one process, the second stage on the other",
    "DP 2": "the whole model on each process, gradients summed",
}
"""Plans for two processes."""

GROUPINGS: dict[str, bool] = {"stock": False, "balanced": True}
"""How a step's samples become microbatches: as dealt, or by cost."""

ENGINE_ARMS: dict[str, str] = {
    "torch": "torch `Schedule1F1B` + `PipelineStage`",
    "hf_dflop": "**hf_dflop**",
    "hf_dflop traced": "hf_dflop, writing its trace",
}

PADDING_ARMS: dict[str, str] = {
    "torch padded": "torch `Schedule1F1B`, every microbatch padded to the longest",
    "stock 1f1b": "hf_dflop, stock microbatches, 1F1B",
    "stock zero-bubble": "hf_dflop, stock microbatches, zero bubble",
    "stock data-aware": "hf_dflop, stock microbatches, our order",
    "balanced 1f1b": "hf_dflop, balanced, 1F1B",
    "balanced zero-bubble": "hf_dflop, balanced, zero bubble",
    "balanced data-aware": "**hf_dflop**, balanced, our order",
    "DDP": "torch DDP, stock microbatches padded by the collator",
    "FSDP2": "torch FSDP2, the same",
}


@dataclass(kw_only=True)
class PipelineSettings:
    """Sizes; the same on both processes, kept as JSON beside the runs."""

    output_dir: Path
    cache: Path
    num_microbatches: int = 4
    """Of a step; half as many on each of two replicas."""
    microbatch_samples: int = 2
    num_batches: int = 1
    """Global batches that are measured; one more is what the prediction is calibrated on."""
    num_rounds: int = 9
    engine_rounds: int = 9
    num_observations: int = 24
    """Microbatches that the cost model is fitted to."""
    vision_layers: int = 6
    vocab_size: int = 4096
    """Tokens kept of the vocabulary, so that the head does not take most of a step."""
    max_tokens: int = 256
    """LLM tokens of a document at most; longer ones would make steps too long to repeat."""
    seed: int = 7

    @property
    def batch_samples(self) -> int:
        """Samples of a global batch."""
        return self.num_microbatches * self.microbatch_samples

    @property
    def model(self) -> DemoModelConfig:
        return DemoModelConfig(vocab_size=self.vocab_size, vision_layers=self.vision_layers)

    def save(self, path: Path) -> None:
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write_whole(path, json.dumps(fields, indent=2))

    @classmethod
    def load(cls, path: Path) -> "PipelineSettings":
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "output_dir": Path(fields["output_dir"]), "cache": Path(fields["cache"])})


def make_plan(
    name: str,
    settings: PipelineSettings,
    *,
    vision_layers: int,
    llm_layers: int,
    balance: bool,
    schedule: str = "1f1b",
) -> Plan:
    """One of `PLANS`."""
    first = (llm_layers + 1) // 2
    pipelined = name != "DP 2"
    dp = 1 if pipelined else 2
    return Plan(
        placement={"vision / LLM": "disjoint", "LLM / LLM": "colocated", "DP 2": "replicated"}[name],
        vision=ModulePlan(layers=(vision_layers,), dp=dp),
        llm=ModulePlan(layers=(first, llm_layers - first) if name == "LLM / LLM" else (llm_layers,), dp=dp),
        num_microbatches=settings.num_microbatches // dp,
        schedule=schedule,
        balance=balance,
        padded=True,
        global_batch_size=settings.batch_samples,
    )
