"""What a plan's steps take on this data: `hf_dflop.simulate`.

In: a plan, a profile (the shapes of a dataset), a cost model, optionally a network. Out: a `Simulation`: several
steps, each of a global batch drawn from the dataset, composed and ordered as the run would, and played.

Assumptions: those of `step`, `stage_seconds` and `durations`. The batches are drawn without replacement, as an epoch
does; steps do not overlap.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import CostModel
from hf_dflop.cost.memory import MemorySettings
from hf_dflop.errors import PlanError
from hf_dflop.plan.calibration import Calibration
from hf_dflop.plan.network import Communication
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.simulate import most_in_flight, simulate_order
from hf_dflop.plan.step import plan_step, rank_of_line
from hf_dflop.plan.step_memory import step_memory
from hf_dflop.plan.timeline import CAUSES, Timeline
from hf_dflop.plan.workload import refuse_sounds
from hf_dflop.shapes import Shapes

__all__ = ["Simulation", "draw_batches", "simulate"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Simulation:
    """Steps of a plan; `summary()` says it in words."""

    plan: Plan
    timelines: tuple[Timeline, ...]
    """One for each step."""
    num_samples: int
    """Samples of each step."""
    peak_tokens: FloatArray
    """`(num_lines,)`: the most LLM tokens in flight on each line, over all steps; of the encoder's, image tokens."""
    peak_bytes: FloatArray
    """`(num_lines,)`: the most bytes, over all steps: parameters, optimizer and what microbatches hold."""
    planning_s: float
    """Median seconds to compose a step and choose its order, here."""

    @property
    def step_s(self) -> FloatArray:
        """`(num_steps,)` seconds."""
        return np.array([timeline.step_s for timeline in self.timelines])

    @property
    def mean_s(self) -> float:
        """Mean seconds of a step."""
        return float(self.step_s.mean())

    @property
    def interval_s(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, by bootstrap over the steps."""
        draws = np.random.default_rng(0).integers(0, len(self.timelines), (1000, len(self.timelines)))
        low, high = np.quantile(self.step_s[draws].mean(axis=1), [0.025, 0.975])
        return float(low), float(high)

    @property
    def idle_fraction(self) -> float:
        """Idle ÷ all seconds, over ranks and steps."""
        return float(sum(t.idle_fraction * t.step_s for t in self.timelines) / self.step_s.sum())

    def idle_s(self, cause: str) -> FloatArray:
        """`(num_lines,)`: mean seconds per step that each line waits for a cause of `CAUSES`."""
        return np.mean([timeline.idle_s[cause] for timeline in self.timelines], axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        low, high = self.interval_s
        first = self.timelines[0]
        return {
            "num_steps": len(self.timelines),
            "num_samples": self.num_samples,
            "step_s": {
                "mean": self.mean_s,
                "mean_low": low,
                "mean_high": high,
                "p95": float(np.quantile(self.step_s, 0.95)),
                "all": self.step_s.tolist(),
            },
            "samples_per_s": self.num_samples / self.mean_s if self.mean_s > 0 else None,
            "idle_fraction": self.idle_fraction,
            "planning_s": self.planning_s,
            "ranks": [
                {
                    "rank": rank_of_line(self.plan, *line),
                    "pipeline_rank": line[0],
                    "replica": line[1],
                    "busy_s": float(np.mean([timeline.busy_s[i] for timeline in self.timelines])),
                    "idle_s": {cause: float(self.idle_s(cause)[i]) for cause in CAUSES},
                    "peak_in_flight": max(int(timeline.peak_in_flight[i]) for timeline in self.timelines),
                    "peak_tokens": int(self.peak_tokens[i]),
                    "peak_bytes": float(self.peak_bytes[i]),
                }
                for i, line in enumerate(first.lines)
            ],
        }

    def summary(self, max_lines: int = 16) -> str:
        """The simulation as text."""
        told = self.to_dict()
        seconds = told["step_s"]
        lines = [
            f"{told['num_steps']} steps of {self.num_samples} samples on {self.plan.num_ranks} ranks "
            f"({self.plan.placement}, {self.plan.schedule})",
            f"step {_ms(seconds['mean'])} (95 % confidence {_ms(seconds['mean_low'])} to "
            f"{_ms(seconds['mean_high'])}), 95 % of the steps below {_ms(seconds['p95'])}; ranks wait "
            f"{self.idle_fraction:.1%} of it",
            f"{'rank':>5} {'part':<28}{'busy':>11}{'imbalance':>11}{'fill/drain':>11}{'network':>11}{'data':>11}"
            f"{'in flight':>11}{'tokens':>11}{'memory':>11}",
        ]
        for rank in told["ranks"][:max_lines]:
            idle = rank["idle_s"]
            part = line_label(self.plan, rank["pipeline_rank"], rank["replica"])
            lines.append(
                f"{rank['rank']:>5} {part:<28}{_ms(rank['busy_s']):>11}"
                + "".join(f"{_ms(idle[cause]):>11}" for cause in CAUSES)
                + f"{rank['peak_in_flight']:>11}{rank['peak_tokens']:>11,}{rank['peak_bytes'] / 2**30:>7.1f} GiB"
            )
        if len(told["ranks"]) > max_lines:
            lines.append(f"... and {len(told['ranks']) - max_lines} more ranks")
        return "\n".join(lines)


def line_label(plan: Plan, pipeline_rank: int, replica: int) -> str:
    """What a line runs, in words."""
    own = plan.vision.pp if plan.placement == "disjoint" else 0
    if plan.placement == "replicated":
        return f"replica {replica}"
    if pipeline_rank < own:
        part = "encoder" if own == 1 else f"encoder {pipeline_rank}"
        dp = plan.vision.dp
    else:
        part = f"LLM {pipeline_rank - own}" if plan.llm.pp > 1 else "LLM"
        dp = plan.llm.dp
        if plan.placement == "colocated" and pipeline_rank == 0:
            part = "encoder + " + part
    return f"{part}, replica {replica}" if dp > 1 else part


def simulate(
    plan: Plan,
    profile: Any,
    cost: CostModel,
    *,
    communication: Communication | None = None,
    num_steps: int = 20,
    wire_bytes: int = 2,
    data_s: float = 0.0,
    optimizer_s: float = 0.0,
    calibration: Calibration | None = None,
    memory: MemorySettings | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Simulation:
    """Simulate steps of a plan on a dataset, without torch.

    Args:
        plan (`Plan`): the layout; `global_batch_size` must be there.
        profile (`DatasetProfile` or `Shapes`): the dataset; a profile that was saved with its samples.
        cost (`CostModel`): of the plan's model.
        communication (`Communication`, *optional*): such as `Network`; without it nothing that is sent takes time.
        num_steps (`int`, defaults to 20): global batches drawn.
        wire_bytes (`int`, defaults to 2): bytes of a number that is sent.
        data_s (`float`): seconds of every step until its first microbatch is there.
        optimizer_s (`float`): clipping and the optimizer.
        calibration (`Calibration`, *optional*): what a recorded run taught, see `compare_run`.
        memory (`MemorySettings`, *optional*): formats and optimizer; bf16, fp32 master weights and AdamW.
        seed (`int`): of the draw.
        progress (*optional*): called with the number of steps done.

    Returns:
        [`Simulation`]

    Raises:
        PlanError: no global batch size, a dataset smaller than it, samples with sounds, or a profile of another model.

    Example:
        >>> simulation = hf_dflop.simulate(hf_dflop.Plan.load("plan.json"), profile, cost)      # doctest: +SKIP
        >>> print(simulation.summary())                                                         # doctest: +SKIP
    """
    shapes = _shapes(profile)
    refuse_sounds(shapes)
    spec = getattr(profile, "spec", None)
    if spec is not None and spec != cost.spec:
        raise PlanError("the profile and the cost model are of different models; use those of one model.")
    if plan.global_batch_size is None:
        raise PlanError("the plan has no global_batch_size; set it to the samples of a step.")
    if num_steps < 1:
        raise PlanError(f"num_steps is {num_steps}; simulate at least one.")
    timelines, tokens, peaks, planning_s = [], [], [], []
    for step, batch in enumerate(draw_batches(len(shapes), plan.global_batch_size, num_steps, seed=seed)):
        begin = time.perf_counter()
        samples = shapes.select(batch)
        planned = plan_step(
            plan,
            cost,
            samples,
            communication=communication,
            wire_bytes=wire_bytes,
            data_s=data_s,
            optimizer_s=optimizer_s,
            calibration=calibration,
            seed=step,
        )
        planning_s.append(time.perf_counter() - begin)
        held = step_memory(plan, cost.spec, samples, planned.groups, memory)
        timeline = simulate_order(
            planned.order, planned.durations, activation_bytes=held.kept, put_off_bytes=held.put_off
        )
        timelines.append(timeline)
        peaks.append(held.peak_bytes(timeline))
        tokens.append(most_in_flight(planned.order, stage_tokens(plan, planned.llm_tokens, planned.image_tokens)))
        if progress is not None:
            progress(step + 1)
    return Simulation(
        plan=plan,
        timelines=tuple(timelines),
        num_samples=plan.global_batch_size,
        peak_tokens=np.max(tokens, axis=0),
        peak_bytes=np.max(peaks, axis=0),
        planning_s=float(np.median(planning_s)),
    )


def draw_batches(num_samples: int, batch_size: int, num_steps: int, *, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Global batches of shuffled epochs, each `(batch_size,)` sample indices; what an epoch leaves over is dropped.

    Raises:
        PlanError: the dataset is smaller than a batch.
    """
    if num_samples < batch_size:
        raise PlanError(
            f"the profile has {num_samples} samples, fewer than a global batch of {batch_size}; profile more rows."
        )
    rng = np.random.default_rng(seed)
    per_epoch = num_samples // batch_size
    order = np.empty(0, dtype=np.int64)
    for step in range(num_steps):
        at = step % per_epoch
        if at == 0:
            order = rng.permutation(num_samples)
        yield order[at * batch_size : (at + 1) * batch_size]


def stage_tokens(plan: Plan, llm: FloatArray, images: FloatArray) -> list[FloatArray]:
    """Tokens that each stage holds of a microbatch: the LLM's, and image tokens of an encoder on its own ranks."""
    image = np.repeat(images.sum(axis=0, keepdims=True) / plan.vision.dp, plan.vision.dp, axis=0)
    first = plan.placement == "disjoint"
    vision = [image if first else np.zeros_like(llm)] * plan.vision.num_stages
    return vision + [llm] * plan.llm.num_stages


def _shapes(profile: Any) -> Shapes:
    shapes = profile if isinstance(profile, Shapes) else getattr(profile, "shapes", None)
    if not isinstance(shapes, Shapes):
        raise PlanError(
            "the profile has no samples to draw batches from (shapes.npz is missing); save it with samples=True."
        )
    usable = np.flatnonzero(shapes.llm_tokens > 0)  # rows marked as unusable have none
    return shapes if usable.size == len(shapes) else shapes.select(usable)


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.1f} ms"
