"""Data-blind homogeneous 3D parallelism: what a user of a text-LLM trainer would run, tuned by exhaustive search.

In: a `Scorer`. Out: the fastest of all plans in which encoder and LLM have the same tensor- and data-parallel degrees,
microbatches are as the stock sampler deals them, and layers are spread evenly by their number:

    the encoder runs on the LLM's first stage (or on every rank, without a pipeline), or has stages of its own;
    every (tp, pp, dp) on all GPUs, tp inside a node; 1, 2, 4, ... microbatches, up to one for each sample;
    1F1B and interleaved 1F1B; recomputation only where it is needed to fit

Every plan that fits is scored on the tuning batches: this is exhaustive, pruned only where a plan's batches so far, or
the work of its busiest rank, are already slower than the best in all. It is tuned on the very data, so its blindness
is in the layout alone.

An encoder whose heads the tensor-parallel degree does not divide is split with padded heads, as the planner does it.
"""

from collections.abc import Callable, Iterator

import numpy as np

from hf_dflop.plan.candidates import checkpointing_variants
from hf_dflop.plan.padded_heads import encoder_share
from hf_dflop.plan.plan import ModulePlan, Plan
from hf_dflop.plan.score import ROUNDING, Scorer
from hf_dflop.plan.space import tensor_degrees

__all__ = ["fsdp_plans", "homogeneous_plans", "tune"]


def even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers by number alone; where they do not divide, the later stages get one more."""
    return tuple((num_layers * (s + 1)) // num_stages - (num_layers * s) // num_stages for s in range(num_stages))


def _counts(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


def homogeneous_plans(scorer: Scorer, again: tuple[bool, bool]) -> Iterator[Plan]:
    """Every homogeneous plan with this (encoder, LLM) recomputation, whether it fits or not."""
    spec, cluster = scorer.workload.spec, scorer.cluster
    batch, total = len(scorer.workload.batches[0]), cluster.num_gpus
    for tp in tensor_degrees(spec.llm, cluster.gpus_per_node):
        for pp in range(1, total // tp + 1):
            if total % (tp * pp) or (dp := total // (tp * pp)) > batch:
                continue
            for own in range(min(pp, spec.vision.num_layers + 1)):  # pipeline ranks of the encoder's own
                if pp - own > spec.llm.num_layers:
                    continue
                placement = "disjoint" if own else ("colocated" if pp > 1 else "replicated")
                for chunks in (1, 2) if pp - own > 1 and 2 * (pp - own) <= spec.llm.num_layers else (1,):
                    vision = ModulePlan(
                        tp=tp, dp=dp, layers=even(spec.vision.num_layers, max(1, own)), checkpointing=again[0]
                    )
                    llm = ModulePlan(
                        tp=tp,
                        dp=dp,
                        layers=even(spec.llm.num_layers, (pp - own) * chunks),
                        num_chunks=chunks,
                        checkpointing=again[1],
                    )
                    for count in _counts(batch // dp):
                        if chunks > 1 and count % (pp - own):
                            continue
                        yield Plan(
                            placement=placement,
                            vision=vision,
                            llm=llm,
                            num_microbatches=count,
                            schedule="interleaved" if chunks > 1 else "1f1b",
                            balance=False,
                            global_batch_size=batch,
                        )


def fsdp_plans(scorer: Scorer, again: tuple[bool, bool]) -> Iterator[Plan]:
    """FSDP over all GPUs, and over the GPUs of a node with copies, with the stock sampler."""
    spec, cluster = scorer.workload.spec, scorer.cluster
    batch, total = len(scorer.workload.batches[0]), cluster.num_gpus
    for shards in sorted({cluster.gpus_per_node, total} - {1}):
        for count in _counts(batch // total):
            yield Plan(
                placement="replicated",
                vision=ModulePlan(dp=total, layers=(spec.vision.num_layers,), checkpointing=again[0]),
                llm=ModulePlan(dp=total, layers=(spec.llm.num_layers,), checkpointing=again[1]),
                num_microbatches=count,
                fsdp_shards=shards,
                balance=False,
                global_batch_size=batch,
            )


def tune(scorer: Scorer, plans: Callable[[Scorer, tuple[bool, bool]], Iterator[Plan]]) -> tuple[Plan | None, int]:
    """The fastest plan that fits, and of how many plans.

    Args:
        scorer (`Scorer`): with the tuning batches.
        plans (callable): `homogeneous_plans` or `fsdp_plans`.
    """
    # in the order of what they cannot go below: the first that cannot win ends the search
    drafts = [
        (work_bound(scorer, plan), number, plan)
        for number, plan in enumerate(
            plan for again in checkpointing_variants(scorer.workload) for plan in plans(scorer, again)
        )
    ]
    drafts.sort(key=lambda draft: draft[:2])
    best, best_s = None, np.inf
    for bound, _, plan in drafts:
        if bound >= best_s:
            break
        if not scorer.fits(plan, composed=False):
            continue
        total = 0.0
        for batch in range(scorer.workload.num_batches):
            total += scorer.seconds(plan, batch)
            if total / scorer.workload.num_batches >= best_s:
                break
        else:
            if scorer.fits(plan, composed=True):
                best, best_s = plan, total / scorer.workload.num_batches
    return best, len(drafts)


def work_bound(scorer: Scorer, plan: Plan) -> float:
    """Mean seconds that the plan's busiest pipeline rank computes, over its replicas: a step takes no less."""
    vision, llm, head = scorer.workload.sums(plan.vision.checkpointing, plan.llm.checkpointing)[:, :3].mean(axis=0)
    vision *= encoder_share(scorer.workload.spec, plan.vision.tp) / plan.vision.dp
    llm, head = llm / (plan.llm.tp * plan.llm.dp), head / (plan.llm.tp * plan.llm.dp)
    layers = plan.llm.layers
    ranks = [llm * sum(layers[rank :: plan.llm.pp]) / sum(layers) for rank in range(plan.llm.pp)]
    ranks[-1] += head
    if plan.placement != "disjoint":
        ranks[0] += vision
        return float(max(ranks)) * (1 - ROUNDING)
    return float(max(*ranks, vision * max(plan.vision.layers) / sum(plan.vision.layers))) * (1 - ROUNDING)
