"""One model on one cluster: baselines, ours and the ablations, scored on the same global batches.

In: a `Setting` and a number of GPUs. Out: a dict of plain numbers, one entry per arm:

    homogeneous        data-blind 3D parallelism, tuned by exhaustive search
    balancer only      that very plan, its microbatches composed by cost
    planner only       the planner's 3D plan for microbatches as the stock sampler deals them
    both               the planner's 3D plan with composed microbatches: the method of the paper
    anything           the planner's choice among all kinds, FSDP and HSDP included
    fsdp               FSDP or HSDP with the stock sampler, tuned: what one gets without any of this

An arm is tuned on a few batches and scored on twelve others, the same for all arms, so ratios are paired.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.errors import PlanError
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.make_plan import NUM_FINAL_BATCHES, describe_layout, final_score, make_plan
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.workload import Workload, draw_batches
from recipes.paper.baseline import fsdp_plans, homogeneous_plans, tune
from recipes.paper.mix import draw_mix
from recipes.paper.settings import SAMPLES_PER_GPU, Setting, a100_cluster

__all__ = ["ARMS", "run_setting"]

ARMS = ("homogeneous", "balancer only", "planner only", "both", "anything", "fsdp")
NUM_SAMPLES = 20_000
NUM_TUNING = 2
NO_SHARDING = ("no-fsdp", "no-hsdp")
_SCHEDULES = ("1f1b", "interleaved")
"""For all arms: the runtimes of the paper's baselines have no zero-bubble schedule."""


@dataclass(kw_only=True)
class _Bench:
    """What all arms share."""

    spec: ModelSpec
    cost: CostModel
    tuning: Scorer
    final: Scorer


def _bench(setting: Setting, num_gpus: int, seed: int) -> _Bench:
    cluster = a100_cluster(num_gpus)
    spec = ModelSpec.from_config(setting.config)
    rate = cluster.reference.flops_per_s
    cost = CostModel.analytic(spec, vision_flops_per_s=rate, llm_flops_per_s=rate)
    batches = draw_batches(
        draw_mix(setting.mix, NUM_SAMPLES, seed), SAMPLES_PER_GPU * num_gpus, NUM_TUNING + NUM_FINAL_BATCHES, seed
    )
    return _Bench(
        spec=spec,
        cost=cost,
        tuning=Scorer(Workload(cost, batches[:NUM_TUNING]), cluster, MemoryRule()),
        final=Scorer(Workload(cost, batches[NUM_TUNING:]), cluster, MemoryRule()),
    )


def run_setting(
    setting: Setting,
    num_gpus: int,
    *,
    arms: tuple[str, ...] = ARMS,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Plan and score every arm.

    Args:
        setting (`Setting`), num_gpus (`int`): model and cluster.
        arms (`tuple[str, ...]`): of `ARMS`.
        seed (`int`): of data and batches.
        tell (callable): gets a line per arm.

    Returns:
        `dict` that JSON can hold; an arm in which nothing fits has `step_s` None.
    """
    bench = _bench(setting, num_gpus, seed)
    found: dict[str, Any] = {
        "name": setting.name,
        "num_gpus": num_gpus,
        "global_batch_size": SAMPLES_PER_GPU * num_gpus,
        "claims": setting.claims,
        "vision_share": _vision_share(bench),
        "arms": {},
    }
    plans: dict[str, Plan | None] = {}
    for arm in arms:
        begin = time.perf_counter()
        tried = None
        if arm == "balancer only":
            plain = plans.get("homogeneous")
            plans[arm] = None if plain is None else replace(plain, balance=True)
        elif arm in ("homogeneous", "fsdp"):
            plans[arm], tried = tune(bench.tuning, homogeneous_plans if arm == "homogeneous" else fsdp_plans)
        else:
            plans[arm] = _planned(bench, setting, num_gpus, arm, seed)
        planning_s = time.perf_counter() - begin
        found["arms"][arm] = {**_scored(bench.final, plans[arm]), "planning_s": planning_s, "tried": tried}
        tell(f"{setting.name} on {num_gpus} GPUs, {arm}: {_line(found['arms'][arm])}")
    return found


def _planned(bench: _Bench, setting: Setting, num_gpus: int, arm: str, seed: int) -> Plan | None:
    try:
        return make_plan(
            bench.spec,
            draw_mix(setting.mix, NUM_SAMPLES, seed),
            bench.tuning.cluster,
            global_batch_size=SAMPLES_PER_GPU * num_gpus,
            constraints=() if arm == "anything" else NO_SHARDING,
            balance=arm != "planner only",
            schedules=_SCHEDULES,
            num_batches=NUM_TUNING,
            seed=seed,
        ).plan
    except PlanError:
        return None


def _vision_share(bench: _Bench) -> float:
    sums = bench.final.workload.sums(False, False)[:, :3].sum(axis=0)
    return float(sums[0] / sums.sum())


def _scored(final: Scorer, plan: Plan | None) -> dict[str, Any]:
    if plan is None:
        return {"step_s": None, "layout": "nothing fits"}
    score = final_score(final, plan)
    return {
        "step_s": score.mean_s,
        "all_s": final.all_seconds(plan).tolist(),
        "p95_s": score.p95_s,
        "idle_fraction": score.idle_fraction,
        "peak_gib": score.peak_bytes / 2**30,
        "layout": describe_layout(plan),
        "plan": plan.to_dict(),
    }


def ratio(run: dict[str, Any], arm: str, to: str = "homogeneous") -> tuple[float, float, float] | None:
    """How many times faster `arm` is than `to`: of the means, with its 95 % interval over paired batches."""
    ours, theirs = run["arms"].get(arm), run["arms"].get(to)
    if not ours or not theirs or ours["step_s"] is None or theirs["step_s"] is None:
        return None
    a, b = np.array(ours["all_s"]), np.array(theirs["all_s"])
    draws = np.random.default_rng(0).integers(0, a.size, (2000, a.size))
    low, high = np.quantile(b[draws].mean(axis=1) / a[draws].mean(axis=1), [0.025, 0.975])
    return float(b.mean() / a.mean()), float(low), float(high)


def _line(arm: dict[str, Any]) -> str:
    if arm["step_s"] is None:
        return "nothing fits"
    return f"{arm['step_s']:.2f} s, idle {arm['idle_fraction']:.0%}, {arm['layout']} ({arm['planning_s']:.1f} s)"
