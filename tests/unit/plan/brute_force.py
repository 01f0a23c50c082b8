"""The search against brute force over every layout and every plan, on random clusters of up to 16 GPUs.

`python -m tests.unit.plan.brute_force --cases 60`: slower and wider than the test of the suite, which looks at a part
of the larger spaces. Models, data, memory, links, frozen modules, padding and mixed GPUs are drawn at random; three
batches, so that bounds have to hold for each of them and not for their mean alone. Exit code 1 if any case differs.
"""

import argparse
import time
from dataclasses import replace

import numpy as np

from hf_dflop.cost import ConnectorSpec, CostModel, ModelSpec, TransformerSpec
from hf_dflop.plan.candidates import SEARCHED_SCHEDULES, checkpointing_variants, draft_plans, make_candidate
from hf_dflop.plan.cluster import Cluster, Gpu, NodeGroup
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.score import Scorer
from hf_dflop.plan.search import search
from hf_dflop.plan.space import Layout, layouts
from hf_dflop.plan.workload import Workload, draw_batches
from hf_dflop.shapes import Shapes

__all__ = ["brute_force", "plans_of", "random_scorer"]


def random_scorer(seed: int) -> Scorer:
    """A model, a dataset and a cluster."""
    random = np.random.default_rng(seed)
    hidden = int(random.choice([256, 512, 1024]))
    heads = int(random.choice([4, 6, 8]))
    llm = TransformerSpec(
        hidden=hidden,
        num_layers=int(random.integers(2, 9)),
        heads=heads,
        kv_heads=int(random.choice([2, heads])),
        head_dim=64,
        intermediate=4 * hidden,
        gated_mlp=bool(random.random() < 0.5),
        vocab=int(random.choice([1000, 30_000])),
        tied_embeddings=bool(random.random() < 0.5),
    )
    vision = TransformerSpec(
        hidden=256,
        num_layers=int(random.integers(1, 9)),
        heads=4,
        kv_heads=4,
        head_dim=64,
        intermediate=1024,
        gated_mlp=False,
    )
    spec = ModelSpec(
        vision=vision, llm=llm, connector=ConnectorSpec(merge=4, linears=((1024, hidden),)), patch_size=14
    )
    num = 200
    tiles = np.where(random.random(num) < random.choice([0.1, 0.6]), 0, random.geometric(0.25, num))
    text = random.lognormal(4.5, random.choice([0.3, 1.2]), num).astype(np.int64) + 5
    shapes = Shapes(
        num_images=(tiles > 0).astype(np.int64),
        image_tiles=tiles,
        image_patches=tiles * 256,
        image_patches_sq=tiles * 256**2,
        image_tokens=tiles * 64,
        text_tokens=text,
        label_tokens=text // 2,
    )
    nodes, gpus = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 6), (1, 8), (2, 2), (2, 4), (2, 8), (4, 4), (3, 4), (8, 2)][
        seed % 12
    ]
    fast = Gpu(
        name="fast",
        memory_bytes=float(random.choice([0.5, 0.7, 1.0, 2.0, 6.0])) * 2**30,
        peak_flops_per_s=2e13,
        memory_bytes_per_s=5e11,
        link_bytes_per_s=float(random.choice([5e9, 5e10])),
    )
    groups: tuple[NodeGroup, ...] = (NodeGroup(nodes=nodes, gpu=fast),)
    if nodes > 1 and random.random() < 0.3:
        slow = replace(fast, name="slow", peak_flops_per_s=1e13, memory_bytes=1.5 * fast.memory_bytes)
        groups = (NodeGroup(nodes=1, gpu=slow), NodeGroup(nodes=nodes - 1, gpu=fast))
    cluster = Cluster(gpus_per_node=gpus, groups=groups, inter_bytes_per_s=float(random.choice([1e9, 2e10])))
    rate = cluster.reference.flops_per_s
    cost = CostModel.analytic(spec, vision_flops_per_s=rate, llm_flops_per_s=rate, per_microbatch_s=1e-4 * (seed % 2))
    frozen = [(), (), ("vision",), ("vision", "connector"), ("llm",)][int(random.integers(5))]
    workload = Workload(
        cost,
        draw_batches(shapes, int(random.choice([6, 12, 20, 32])), 3, seed),
        frozen=frozen,
        padded=bool(random.random() < 0.3),
    )
    return Scorer(workload, cluster, MemoryRule(reserve_bytes=0.0))


def plans_of(scorer: Scorer, layout: Layout) -> list[Plan]:
    """All plans of a layout that fit: for each schedule and number of microbatches, the least recomputation."""
    found = []
    workload = scorer.workload
    for schedule, chunks, count in draft_plans(layout, len(workload.batches[0]), SEARCHED_SCHEDULES):
        for again in checkpointing_variants(workload):
            plan = make_candidate(workload, layout, schedule, chunks, count, again)
            if plan is not None and scorer.fits(plan, composed=True):
                found.append(plan)
                break
    return found


def brute_force(scorer: Scorer) -> tuple[float | None, Plan | None, int]:
    """Least mean seconds, its plan, plans scored."""
    best_s, best, count = np.inf, None, 0
    for layout in layouts(scorer.workload.spec, scorer.cluster, len(scorer.workload.batches[0])):
        for plan in plans_of(scorer, layout):
            count += 1
            mean = float(scorer.all_seconds(plan).mean())
            if mean < best_s:
                best_s, best = mean, plan
    return (None if best is None else best_s), best, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    wrong = 0
    for seed in range(arguments.first, arguments.first + arguments.cases):
        begin = time.perf_counter()
        scorer = random_scorer(seed)
        expected, best, count = brute_force(scorer)
        all_s = time.perf_counter() - begin
        begin, before = time.perf_counter(), scorer.num_simulated
        batch = len(scorer.workload.batches[0])
        winner = search(scorer, list(layouts(scorer.workload.spec, scorer.cluster, batch))).winner
        got = None if winner is None else winner.mean_s
        same = got == expected
        wrong += not same
        print(
            f"case {seed}: {scorer.cluster.num_gpus} GPUs, {count} plans in {all_s:.1f} s, search "
            f"{scorer.num_simulated - before} steps in {time.perf_counter() - begin:.2f} s: "
            f"{'same' if same else f'DIFFERS {got} {expected} {best}'}",
            flush=True,
        )
    print(f"{arguments.cases - wrong} of {arguments.cases} equal")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
