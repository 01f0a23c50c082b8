"""All the ways to lay a model out on a cluster that the planner chooses from.

In: a `ModelSpec` and a `Cluster`. Out: `Layout`s: degrees of the two modules on all GPUs of the cluster; what a plan
adds (microbatches, schedule, recomputation) comes later, for the layouts that are worth it.

    replicated   every rank has the whole model (DDP), or a shard of it (FSDP over all, HSDP over a node)
    colocated    the encoder on the ranks of the LLM's first stage, pipeline of 2 and more
    disjoint     encoder and LLM on their own ranks, each with its own tp, pp, dp

Assumptions: tensor parallelism stays inside a node, and divides heads, KV heads and MLP widths; all GPUs are used.
"""

from collections.abc import Iterator
from typing import NamedTuple

from hf_dflop.cost import ModelSpec, TransformerSpec
from hf_dflop.plan.cluster import Cluster

__all__ = ["Layout", "layouts", "tensor_degrees"]


class Layout(NamedTuple):
    """Degrees of both modules."""

    placement: str
    v_tp: int
    v_pp: int
    v_dp: int
    l_tp: int
    l_pp: int
    l_dp: int
    shards: int
    """FSDP shards, 1: none."""


def tensor_degrees(spec: TransformerSpec, gpus_per_node: int) -> list[int]:
    """Tensor-parallel degrees that divide a node and the module's widths: powers of two."""
    widths = [spec.heads, spec.kv_heads, spec.intermediate]
    if spec.num_moe_layers:
        widths += [spec.expert_intermediate, *([spec.shared_intermediate] if spec.shared_intermediate else [])]
    degrees, tp = [], 1
    while tp <= gpus_per_node:
        if gpus_per_node % tp == 0 and all(width % tp == 0 for width in widths):
            degrees.append(tp)
        tp *= 2
    return degrees


def _triples(num_ranks: int, degrees: list[int], num_layers: int) -> Iterator[tuple[int, int, int]]:
    for tp in degrees:
        if num_ranks % tp:
            continue
        rest = num_ranks // tp
        for pp in range(1, min(rest, num_layers) + 1):
            if rest % pp == 0:
                yield tp, pp, rest // pp


def layouts(spec: ModelSpec, cluster: Cluster, global_batch_size: int) -> Iterator[Layout]:
    """Every layout that has a sample for each LLM replica, the plain ones first."""
    total, node = cluster.num_gpus, cluster.gpus_per_node
    vision_degrees = tensor_degrees(spec.vision, node)
    llm_degrees = tensor_degrees(spec.llm, node)
    both = [tp for tp in llm_degrees if tp in vision_degrees]
    for tp, pp, dp in _triples(total, both, spec.llm.num_layers):
        if dp > global_batch_size:
            continue
        if pp > 1:
            yield Layout("colocated", tp, 1, dp, tp, pp, dp, 1)
            continue
        for shards in sorted({1, dp, node // tp}):
            if dp % shards == 0:
                yield Layout("replicated", tp, 1, dp, tp, 1, dp, shards)
    for num_vision in range(1, total):
        for l_tp, l_pp, l_dp in _triples(total - num_vision, llm_degrees, spec.llm.num_layers):
            # a tensor-parallel group must not lie across two nodes
            if l_dp > global_batch_size or (total > node and num_vision % l_tp):
                continue
            for v_tp, v_pp, v_dp in _triples(num_vision, vision_degrees, spec.vision.num_layers):
                yield Layout("disjoint", v_tp, v_pp, v_dp, l_tp, l_pp, l_dp, 1)
