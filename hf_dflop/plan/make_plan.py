"""The planner: the best layout of a model on a cluster, for this data.

In: a model's config, the shapes of a dataset, a cluster, a global batch size. Out: a `Planning`: the winner as a
`Plan`, the best of the other kinds, why the rest was ruled out, in numbers and in words (`explain`).

The score is the expected seconds of a step: the mean over a few global batches drawn from the dataset, the same ones
for every plan, each composed by the sampler's code and played by the simulator. The winner and its rivals are then
played on more batches, for the mean, its interval and the 95th percentile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.errors import PlanError
from hf_dflop.plan.candidates import SEARCHED_SCHEDULES
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.plan import SCHEDULES, Plan
from hf_dflop.plan.remedies import remedies
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.search import SearchResult, search
from hf_dflop.plan.space import layouts
from hf_dflop.plan.workload import Workload, draw_batches
from hf_dflop.shapes import Shapes

__all__ = ["Planning", "Score", "make_plan", "nothing_fits"]

NUM_FINAL_BATCHES = 12
MAX_FINAL_SAMPLES = 60_000
"""Samples over all the batches of the final scores: twelve batches, fewer of large ones, which differ less."""
NUM_NEXT = 6
MAX_NEXT_SAMPLES = 360_000
"""The next best plans are scored on the final batches too: six, or as many as so many samples allow."""
MAX_SEARCH_SAMPLES = 6_000
"""Samples over all the batches of a search: three batches, fewer where batches are large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Expected seconds of a step, over fresh batches."""

    mean_s: float
    low_s: float
    """2.5 % of the mean's interval, by bootstrap over the batches."""
    high_s: float
    p95_s: float
    """Of a step."""
    compute_s: float
    """Mean seconds that a GPU computes; the rest it waits or communicates."""
    peak_bytes: float
    """Of the fullest GPU."""

    @property
    def idle_fraction(self) -> float:
        return 1.0 - self.compute_s / self.mean_s


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Planning:
    """What the planner found."""

    plan: Plan
    """The winner, with its score in `expected`."""
    score: Score
    rivals: tuple[tuple[str, Plan, Score], ...]
    """The best of the other kinds, as far as it was found, and the next best plans: (kind, plan, score)."""
    result: SearchResult
    spec: ModelSpec
    cluster: Cluster
    global_batch_size: int
    num_samples: int
    """Of the dataset."""
    constraints: tuple[str, ...]
    scorer: Scorer

    def explain(self) -> str:
        """The winner, the runners-up and why they are slower, what limits it, what was ruled out."""
        from hf_dflop.plan.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        from hf_dflop.plan.explain import planning_dict

        return planning_dict(self)


def make_plan(
    model_config: Any,
    profile: Any,
    cluster: Cluster,
    *,
    global_batch_size: int,
    cost_model: CostModel | None = None,
    constraints: Sequence[str] = (),
    frozen: Sequence[str] = (),
    cached_features: bool = False,
    balance: bool = True,
    padded: bool = False,
    schedules: Sequence[str] = SEARCHED_SCHEDULES,
    memory: MemoryRule | None = None,
    num_batches: int | None = None,
    every_kind: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Planning:
    """Choose how to spread a vision-language model over a cluster, for a dataset.

    Args:
        model_config (config, `dict` or [`ModelSpec`]): the model.
        profile ([`DatasetProfile`] or [`Shapes`]): the dataset that it will train on.
        cluster ([`Cluster`]): the machines.
        global_batch_size (`int`): samples of an optimizer step.
        cost_model ([`CostModel`], *optional*):
            Measured seconds on the cluster's fastest GPU; by default FLOPs at the share of the peak that the cluster's
            GPUs are said to achieve.
        constraints (`Sequence[str]`): what to rule out: `"vision.tp<=2"`, `"no-fsdp"`, ... (see `Constraints`).
        frozen (`Sequence[str]`): modules that are not trained: of `"vision"`, `"connector"`, `"llm"`.
        cached_features (`bool`): a frozen encoder's features are read from disk.
        balance (`bool`): microbatches are composed by cost; `False`: as the stock sampler deals them.
        padded (`bool`): rows are padded, not packed.
        schedules (`Sequence[str]`): those to try.
        memory ([`MemoryRule`], *optional*): formats, optimizer and margin; by default bf16 with fp32 master weights
            and AdamW, and 8 % + 1.5 GiB left free.
        num_batches (`int`, *optional*): global batches that plans are compared on; by default 3, fewer of large ones.
        every_kind (`bool`): look for the best of each kind too, where it is within a quarter of the winner.
        seed (`int`): of the batches.
        progress (`Callable`, *optional*): called with (layouts done, layouts).

    Returns:
        `Planning`: `.plan` to save and run, `.explain()` to read.

    Raises:
        PlanError: nothing fits (the message says what came nearest), or an argument is not usable.
    """
    spec = model_config if isinstance(model_config, ModelSpec) else ModelSpec.from_config(model_config)
    if not spec.takes_images:
        raise PlanError(
            "the model takes sounds and no images; plans do not place an audio encoder. Balance such a model with "
            "DflopCallback."
        )
    shapes = profile if isinstance(profile, Shapes) else getattr(profile, "shapes", None)
    if shapes is None:
        raise PlanError("the profile has no shapes of its samples; save it with them, or pass Shapes.")
    known = getattr(profile, "spec", None)
    if known is not None and known != spec:
        raise PlanError(
            "the profile was made for another model: its config differs from model_config. Profile the dataset with "
            "this model's processor, or plan for that model."
        )
    if unknown := sorted(set(schedules) - set(SCHEDULES)):
        raise PlanError(f"schedules names {unknown}; use {', '.join(SEARCHED_SCHEDULES)}.")
    if cost_model is None:
        rate = cluster.reference.flops_per_s
        cost_model = CostModel.analytic(spec, vision_flops_per_s=rate, llm_flops_per_s=rate)
    elif cost_model.spec != spec:
        raise PlanError("the cost model is of another model than model_config; measure this one.")
    rules, rule = Constraints(constraints), memory or MemoryRule()
    if num_batches is None:
        num_batches = int(np.clip(MAX_SEARCH_SAMPLES // max(1, global_batch_size), 1, 3))
    num_final = int(np.clip(MAX_FINAL_SAMPLES // max(1, global_batch_size), 3, NUM_FINAL_BATCHES))
    drawn = draw_batches(shapes, global_batch_size, num_batches + num_final, seed)
    ways: dict[str, Any] = {"frozen": tuple(frozen), "cached_features": cached_features, "padded": padded}
    scorer = Scorer(Workload(cost_model, drawn[:num_batches], **ways), cluster, rule)
    found = list(layouts(spec, cluster, global_batch_size))
    result = search(
        scorer,
        found,
        constraints=rules,
        schedules=schedules,
        balance=balance,
        every_kind=every_kind,
        progress=progress,
    )
    winner = result.winner
    if winner is None:
        raise PlanError(nothing_fits(result, scorer, found, rules))
    final = Scorer(Workload(cost_model, drawn[num_batches:], **ways), cluster, rule)
    score = final_score(final, winner.plan)
    others = [(kind, one) for kind, one in result.best.items() if one is not winner]
    num_next = int(np.clip(MAX_NEXT_SAMPLES // (num_final * global_batch_size), 1, NUM_NEXT))
    others += [("next", one) for one in result.scored if one is not winner and one not in result.best.values()][
        :num_next
    ]
    rivals = [(kind, one.plan, final_score(final, one.plan)) for kind, one in others]
    plan = replace(
        winner.plan,
        spec_hash=None,
        expected={
            "step_s": score.mean_s,
            "step_s_interval": [score.low_s, score.high_s],
            "step_s_p95": score.p95_s,
            "idle_fraction": score.idle_fraction,
            "peak_bytes": score.peak_bytes,
            "samples_per_s": global_batch_size / score.mean_s,
            "cluster": cluster.to_dict(),
        },
    )
    return Planning(
        plan=plan,
        score=score,
        rivals=tuple(sorted(rivals, key=lambda rival: rival[2].mean_s)),
        result=result,
        spec=spec,
        cluster=cluster,
        global_batch_size=global_batch_size,
        num_samples=len(shapes),
        constraints=rules.texts,
        scorer=final,
    )


def final_score(scorer: Scorer, plan: Plan) -> Score:
    """Score a plan on all batches of a scorer's workload."""
    seconds = scorer.all_seconds(plan)
    draws = np.random.default_rng(0).integers(0, seconds.size, (1000, seconds.size))
    low, high = np.quantile(seconds[draws].mean(axis=1), [0.025, 0.975])
    sums = scorer.workload.sums(plan.vision.checkpointing, plan.llm.checkpointing)[:, :3].sum(axis=1)
    return Score(
        mean_s=float(seconds.mean()),
        low_s=float(low),
        high_s=float(high),
        p95_s=float(np.quantile(seconds, 0.95)),
        compute_s=float(sums.mean() / plan.num_ranks),
        peak_bytes=max(scorer.bytes_of(plan, True)),
    )


def nothing_fits(result: SearchResult, scorer: Scorer, found: Sequence[Any], rules: Constraints) -> str:
    """Why there is no plan, and what would help."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in result.rejected.most_common(4)) or "none"
    text = f"no plan of {len(found)} layouts on {scorer.cluster.num_gpus} GPUs is left (ruled out by {reasons})."
    if result.closest is not None and any("memory" in reason for reason in result.rejected):
        need, plan = result.closest
        room = float(scorer.room(plan).min()) / 2**30
        text += f" The nearest needs {need * room:.1f} GiB of {room:.1f} GiB: {describe_layout(plan)}."
        fitting = [f"{change} ({describe_layout(plan)})" for change, plan in remedies(scorer, rules)]
        if fitting:
            text += f" This would fit: {'; '.join(fitting)}."
        else:
            text += " Neither more nodes, nor larger GPUs, nor one frozen module would fit; use a smaller optimizer."
    if rules.texts:
        text += f" Without the constraints {', '.join(rules.texts)} there may be more to choose from."
    return text


def describe_layout(plan: Plan) -> str:
    """A plan in half a line."""

    def module(name: str, one: Any) -> str:
        return f"{name} tp={one.tp} pp={one.pp} dp={one.dp}{' recomputing' if one.checkpointing else ''}"

    if plan.placement == "replicated":
        kind = "DDP" if plan.fsdp_shards == 1 else "FSDP" if plan.fsdp_shards == plan.llm.dp else "HSDP"
        shards = f" of {plan.fsdp_shards} shards" if kind == "HSDP" else ""
        again = [name for name, one in (("vision", plan.vision), ("LLM", plan.llm)) if one.checkpointing]
        tail = f", {' and '.join(again)} recomputing" if again else ""
        return f"{kind}{shards}, tp={plan.llm.tp} dp={plan.llm.dp}, {plan.num_microbatches} microbatches{tail}"
    schedule = f"{plan.schedule}, {plan.num_microbatches} microbatches"
    return f"{plan.placement}: {module('vision', plan.vision)} | {module('LLM', plan.llm)}, {schedule}"
