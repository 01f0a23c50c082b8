"""When no plan fits: which change makes one fit. Tried, not extrapolated.

In: the `Scorer` of the search that found nothing, its constraints. Out: changes, each with a plan that fits under it:
more nodes (the fewest, by doubling), GPUs with more memory, a frozen module. Seconds are not looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hf_dflop.plan.candidates import SEARCHED_SCHEDULES, draft_plans, make_candidate
from hf_dflop.plan.cluster import GPUS, Cluster, NodeGroup
from hf_dflop.plan.constraints import Constraints
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.shortlist import Shortlist
from hf_dflop.plan.space import LayoutTable, layouts
from hf_dflop.plan.workload import Workload

__all__ = ["first_fit", "remedies"]

MAX_GPUS = 1024
"""Of the larger clusters that are tried."""
MAX_LAYOUTS = 30
"""Layouts that are tried plan by plan, those that need least first."""


def remedies(
    scorer: Scorer, rules: Constraints, schedules: Sequence[str] = SEARCHED_SCHEDULES
) -> Iterator[tuple[str, Plan]]:
    """Changes in words, and a plan that fits under each.

    Args:
        scorer (`Scorer`): workload, cluster, memory rule of the search.
        rules (`Constraints`), schedules (`Sequence[str]`): those of the search.
    """
    cluster, workload = scorer.cluster, scorer.workload
    factor = 2
    while factor * cluster.num_gpus <= MAX_GPUS:
        groups = tuple(NodeGroup(nodes=factor * group.nodes, gpu=group.gpu) for group in cluster.groups)
        larger = replace(cluster, groups=groups)
        plan = first_fit(Scorer(workload, larger, scorer.rule), rules, schedules)
        if plan is not None:
            yield f"{larger.nodes} nodes instead of {cluster.nodes}", plan
            break
        factor *= 2
    most = max(group.gpu.memory_bytes for group in cluster.groups)
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes):
        if gpu.memory_bytes > most:
            roomier = Cluster(
                nodes=cluster.nodes,
                gpus_per_node=cluster.gpus_per_node,
                gpu=gpu,
                inter_bytes_per_s=cluster.inter_bytes_per_s,
                latency_s=cluster.latency_s,
            )
            plan = first_fit(Scorer(workload, roomier, scorer.rule), rules, schedules)
            if plan is not None:
                yield f"as many {gpu.name}", plan
                break
    for name in ("vision", "llm"):
        if name not in workload.frozen:
            frozen = Workload(
                workload.cost,
                workload.batches,
                frozen=(*workload.frozen, name),
                cached_features=workload.cached_features,
                padded=workload.padded,
            )
            plan = first_fit(Scorer(frozen, cluster, scorer.rule), rules, schedules)
            if plan is not None:
                yield f"{'the encoder' if name == 'vision' else 'the LLM'} frozen", plan


def first_fit(scorer: Scorer, rules: Constraints, schedules: Sequence[str]) -> Plan | None:
    """A plan that fits, of the layouts that need the least memory; None if none of them has one."""
    workload = scorer.workload
    batch = len(workload.batches[0])
    table = LayoutTable.of(list(layouts(workload.spec, scorer.cluster, batch)))
    if not len(table):
        return None
    shortlist = Shortlist(scorer, table, rules, interleaved=False)
    need = np.where(shortlist.kept, shortlist.need, np.inf)
    for place in np.argsort(need, kind="stable")[:MAX_LAYOUTS].tolist():
        if need[place] > 1:
            return None
        for schedule, chunks, count in draft_plans(table.layout(place), batch, [s for s in schedules if s == "1f1b"]):
            for variant in reversed(shortlist.variants):
                plan = make_candidate(workload, table.layout(place), schedule, chunks, count, variant[:2])
                if plan is None or rules.rejects(plan) is not None or not scorer.fits(plan, composed=False):
                    continue
                if scorer.fits(plan, composed=True):
                    return plan
    return None
