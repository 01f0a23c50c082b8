"""What no plan of a layout can go below, for all layouts at once.

In: layouts, the sums of a workload, recomputation and stages per rank, the fewest microbatches that are tried. Out:
seconds of each batch. A step is at least as long as

    load      the mean over its replicas (of stock microbatches: the busiest one) of what a pipeline rank computes,
              tensor-parallel sums included, and the sum of its gradients, which a pipeline hides nothing of
    way       the dearest sample's way through all stages

both of which hold for any composition of microbatches, any order and any schedule: padding, idling and other
communication only add to it. Layers are split as the plan would split them, so a bound holds for its own variant
alone; that of a layout is the least of its variants. A test compares it with the score of every plan of small spaces.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.parameters import parameter_counts
from hf_dflop.cost.parts import MODULE_OF_PART
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.padded_heads import encoder_share, padded_encoder
from hf_dflop.plan.space import PLACED, Layout, LayoutTable
from hf_dflop.plan.split import split_layers
from hf_dflop.plan.workload import Workload

__all__ = ["Variant", "end_layers", "layers_of", "layout_bounds"]

FloatArray = npt.NDArray[np.float64]


class Variant(NamedTuple):
    """What is decided beside the degrees and before the microbatches."""

    vision_checkpointing: bool = False
    llm_checkpointing: bool = False
    num_chunks: int = 1


def layers_of(workload: Workload, layout: Layout, variant: Variant) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers of each stage of encoder and LLM; uneven, since the ends carry the head, and a colocated encoder."""
    spec = workload.spec
    encoder, head = workload.extra_layers(variant.vision_checkpointing, variant.llm_checkpointing)
    vision = split_layers(spec.vision.num_layers, layout.v_pp)
    first = encoder if layout.placement == "colocated" else 0.0
    llm = split_layers(spec.llm.num_layers, layout.l_pp * variant.num_chunks, first_extra=first, last_extra=head)
    return vision, llm


def layout_bounds(
    workload: Workload,
    cluster: Cluster,
    found: Sequence[Layout] | LayoutTable,
    variant: Variant,
    *,
    counts: Any = 1,
    wire_bytes: int = 2,
    stock_count: int | None = None,
) -> FloatArray:
    """Lower bounds `(num_layouts, num_batches)`, seconds; inf where the variant does not exist.

    Args:
        workload (`Workload`), cluster (`Cluster`): for which.
        found (`LayoutTable` or `Sequence[Layout]`): layouts.
        variant (`Variant`): recomputation and chunks.
        counts: one number or `(num_layouts,)`: microbatches of a replica, or fewer.
        wire_bytes (`int`): bytes of a number that is summed over tensor-parallel ranks.
        stock_count (`int`, *optional*):
            So many microbatches, as the stock sampler deals them: the busiest replica instead of the mean.
    """
    found = found if isinstance(found, LayoutTable) else LayoutTable.of(found)
    spec = workload.spec
    again = (variant.vision_checkpointing, variant.llm_checkpointing)
    sums = workload.sums(*again)
    vision_s, llm_s, head_s, positions, tokens = (sums[:, k][None] for k in range(5))
    v_tp, _, v_dp, l_tp, l_pp, l_dp, _ = (column[:, None] for column in found.columns[1:].astype(np.float64))
    disjoint = found.is_disjoint[:, None]
    if stock_count is not None:  # `(num_layouts, num_batches)`: as if all replicas had what the busiest has
        busiest = found.looked_up(
            ("placement", "l_dp"),
            lambda placed, replicas: workload.busiest(*again, replicas, stock_count, PLACED[placed] != "disjoint"),
        )
        llm_s, head_s, tokens = (busiest[:, :, k] for k in (1, 2, 4))
        vision_s = np.where(disjoint, sums[:, 0], busiest[:, :, 0])
    # tensor-parallel sums: two per layer and direction, which nothing hides
    network = cluster.network
    per_position = 4 * wire_bytes / network.intra_bytes_per_s
    trained = sums[0, 0] > 0 and not ({"vision", "connector"} <= set(workload.frozen) or workload.cached_features)
    v_ways = 1 + (1 + variant.vision_checkpointing) * trained
    l_ways = 2 + variant.llm_checkpointing
    v_sum_s = per_position * spec.vision.hidden * v_ways * positions * (v_tp - 1) / v_tp
    l_sum_s = per_position * spec.llm.hidden * l_ways * tokens * (l_tp - 1) / l_tp
    # every microbatch has a sample, and so pays the latency; not every one has an image
    l_sum_s = l_sum_s + 4 * network.latency_s * l_ways * (l_tp - 1) * np.reshape(counts, (-1, 1)) * l_dp
    # (num_layouts, 1): largest vision stage; layers of the first, the largest, the last LLM rank
    _, _, v_layers, l_first, l_most, l_last = (column[:, None] for column in _held_layers(workload, found, variant))
    num_v, num_l = spec.vision.num_layers, spec.llm.num_layers
    share = found.looked_up(("v_tp",), lambda tp: encoder_share(spec, tp))[:, None]
    vision = v_layers / num_v * (vision_s * share) + v_layers * v_sum_s
    llm_layer = llm_s / num_l / l_tp + l_sum_s
    first = l_first * llm_layer + np.where(disjoint, 0.0, vision * l_dp / v_dp)
    last = l_last * llm_layer + head_s / l_tp
    # of an encoder's rank, the LLM's first, largest and last: `(num_layouts, 1)`
    v_reduce_s, *reduce_s = (one[:, None] for one in least_sums(workload, cluster, found, variant, wire_bytes))
    load = np.maximum(
        np.where(disjoint, vision / v_dp + v_reduce_s, 0.0),
        np.where(
            l_pp == 1,
            (first + head_s / l_tp) / l_dp + reduce_s[0],
            np.maximum(
                np.maximum(first / l_dp + reduce_s[0], l_most * llm_layer / l_dp + reduce_s[1]),
                last / l_dp + reduce_s[2],
            ),
        ),
    )
    bound = np.maximum(load, found.looked_up(("v_tp", "l_tp"), lambda v, t: workload.longest(*again, v, t)))
    return np.where(np.isnan(v_layers), np.inf, bound)


def least_sums(
    workload: Workload, cluster: Cluster, table: LayoutTable, variant: Variant, wire_bytes: int
) -> tuple[FloatArray, ...]:
    """Seconds that summing gradients takes at least, `(num_layouts,)` each: of the encoder's ranks where they are its
    own, of the LLM's first rank, the one with the most layers, the last. 0 without a pipeline, where the last backward
    may hide them."""
    spec, network = workload.spec, cluster.network

    def bytes_of(part: str, degree: str) -> FloatArray:
        """Of the gradients of one part on a rank."""
        if MODULE_OF_PART[part] in workload.frozen:
            return np.zeros(len(table))
        whole = part.startswith("llm")
        return wire_bytes * table.looked_up(
            (degree,), lambda tp: parameter_counts(spec if whole else padded_encoder(spec, tp), tp=tp)[part]
        )

    def summed(num_bytes: FloatArray, replicas: npt.NDArray[np.int64], tp: npt.NDArray[np.int64]) -> FloatArray:
        fastest = max(network.intra_bytes_per_s, network.inter_bytes_per_s)
        one_node = (replicas - 1) * tp < cluster.gpus_per_node
        bandwidth = np.where(one_node, fastest, network.inter_bytes_per_s)
        seconds = 2 * (replicas - 1) * (network.latency_s + num_bytes / replicas / bandwidth)
        return np.where((num_bytes > 0) & (table.columns[0] != PLACED.index("replicated")), seconds, 0.0)

    held = _held_layers(workload, table, variant)
    v_tp, _, v_dp, l_tp, l_pp, l_dp, _ = table.columns[1:]
    vision = np.nan_to_num(held[2]) * bytes_of("vision_layer", "v_tp")
    inside = vision + bytes_of("vision_fixed", "v_tp") + bytes_of("connector", "v_tp")
    layer, head = bytes_of("llm_layer", "l_tp"), bytes_of("llm_head", "l_tp")
    first = held[3] * layer + bytes_of("llm_fixed", "l_tp") + np.where(table.is_disjoint, 0.0, inside)
    first = first + np.where((l_pp == 1) & (not spec.llm.tied_embeddings), head, 0.0)
    of_llm = (first, held[4] * layer, held[5] * layer + head)
    return summed(vision, v_dp, v_tp), *(summed(np.nan_to_num(one), l_dp, l_tp) for one in of_llm)


def end_layers(workload: Workload, table: LayoutTable, variant: Variant) -> tuple[FloatArray, ...]:
    """Layers of the encoder's first and last stage and of the LLM's first and last rank, `(num_layouts,)` each; nan
    where the variant does not exist."""
    v_first, v_last, _, l_first, _, l_last = _held_layers(workload, table, variant)
    return v_first, v_last, l_first, l_last


def _held_layers(workload: Workload, table: LayoutTable, variant: Variant) -> FloatArray:
    """`(6, num_layouts)`: the encoder's first, last and largest stage, the LLM's first, largest and last rank."""
    num_layers = workload.spec.llm.num_layers

    def held(placement: int, v_pp: int, l_pp: int) -> tuple[float, ...]:
        if (l_pp == 1 and variant.num_chunks > 1) or l_pp * variant.num_chunks > num_layers:
            return (np.nan,) * 6
        vision, llm = layers_of(workload, Layout(PLACED[placement], 1, v_pp, 1, 1, l_pp, 1, 1), variant)
        ranks = [sum(llm[rank::l_pp]) for rank in range(l_pp)]
        return vision[0], vision[-1], max(vision), ranks[0], max(ranks), ranks[-1]

    return table.looked_up(("placement", "v_pp", "l_pp"), held).T
