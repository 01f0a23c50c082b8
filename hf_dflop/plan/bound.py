"""What no plan of a layout can go below, for all layouts at once.

In: layouts as an array, the sums of a workload. Out: seconds of each batch. A step is at least as long as

    load      the mean over its replicas of what the busiest pipeline rank computes, tensor-parallel sums included
    way       the dearest sample's way through all stages

both of which hold for any composition of microbatches, any order and any schedule: padding, idling and communication
only add to it. A test compares it with the score of every plan of small spaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.space import Layout
from hf_dflop.plan.split import split_layers
from hf_dflop.plan.workload import Workload

__all__ = ["Variant", "layers_of", "layout_bounds"]

FloatArray = npt.NDArray[np.float64]


class Variant(NamedTuple):
    """What is decided beside the degrees and before the microbatches."""

    vision_checkpointing: bool = False
    llm_checkpointing: bool = False
    num_chunks: int = 1


@dataclass(frozen=True, slots=True)
class _Ratio:
    """Work of encoder and head, in LLM layers."""

    encoder: float
    head: float


def _ratio(workload: Workload, variant: Variant) -> _Ratio:
    vision, llm, head = workload.sums(variant.vision_checkpointing, variant.llm_checkpointing)[:, :3].sum(axis=0)
    layer = llm / workload.spec.llm.num_layers
    return _Ratio(vision / layer, head / layer) if layer > 0 else _Ratio(0.0, 0.0)


def layers_of(workload: Workload, layout: Layout, variant: Variant) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers of each stage of encoder and LLM; uneven, since the ends carry the head, and a colocated encoder."""
    spec = workload.spec
    ratio = _ratio(workload, variant)
    vision = split_layers(spec.vision.num_layers, layout.v_pp)
    first = ratio.encoder if layout.placement == "colocated" else 0.0
    llm = split_layers(spec.llm.num_layers, layout.l_pp * variant.num_chunks, first_extra=first, last_extra=ratio.head)
    return vision, llm


def layout_bounds(
    workload: Workload,
    cluster: Cluster,
    found: Sequence[Layout],
    variant: Variant,
    *,
    wire_bytes: int = 2,
) -> FloatArray:
    """Lower bounds `(num_layouts, num_batches)`, seconds; inf where the variant does not exist.

    Args:
        workload (`Workload`), cluster (`Cluster`): for which.
        found (`Sequence[Layout]`): layouts.
        variant (`Variant`): recomputation and chunks.
        wire_bytes (`int`): bytes of a number that is summed over tensor-parallel ranks.
    """
    spec = workload.spec
    again = (variant.vision_checkpointing, variant.llm_checkpointing)
    sums = workload.sums(*again)
    vision_s, llm_s, head_s, positions, tokens = (sums[:, k][None] for k in range(5))
    table = np.array([layout[1:] for layout in found], dtype=np.float64).reshape(len(found), 7)
    v_tp, _, v_dp, l_tp, l_pp, l_dp, _ = (table[:, k][:, None] for k in range(7))
    disjoint = np.array([layout.placement == "disjoint" for layout in found])[:, None]
    # tensor-parallel sums, without latency: two per layer and direction, which nothing hides
    network = cluster.network
    per_position = 4 * wire_bytes / network.intra_bytes_per_s
    trained = sums[0, 0] > 0 and not ({"vision", "connector"} <= set(workload.frozen) or workload.cached_features)
    v_ways = 1 + (1 + variant.vision_checkpointing) * trained
    l_ways = 2 + variant.llm_checkpointing
    v_sum_s = per_position * spec.vision.hidden * v_ways * positions * (v_tp - 1) / v_tp
    l_sum_s = per_position * spec.llm.hidden * l_ways * tokens * (l_tp - 1) / l_tp
    kinds = {(lay.placement, lay.v_pp, lay.l_pp) for lay in found}
    parts = {kind: _stage_parts(workload, *kind, variant) for kind in kinds}
    held = np.array([parts[lay.placement, lay.v_pp, lay.l_pp] for lay in found])
    # (num_layouts, 1): largest vision stage; layers of the first, the largest middle, the last LLM rank
    v_layers, l_first, l_most, l_last = (held[:, k][:, None] for k in range(4))
    num_v, num_l = spec.vision.num_layers, spec.llm.num_layers
    vision = v_layers / num_v * (vision_s / v_tp) + v_layers * v_sum_s
    llm_layer = llm_s / num_l / l_tp + l_sum_s
    first = l_first * llm_layer + np.where(disjoint, 0.0, vision * l_dp / v_dp)
    last = l_last * llm_layer + head_s / l_tp
    alone = l_pp == 1
    load = np.maximum(
        np.where(disjoint, vision / v_dp, 0.0),
        np.where(
            alone,
            (first + head_s / l_tp) / l_dp,
            np.maximum(np.maximum(first, l_most * llm_layer), last) / l_dp,
        ),
    )
    way = np.stack([workload.longest(*again, int(lay.v_tp), int(lay.l_tp)) for lay in found]) if found else load
    bound = np.maximum(load, way)
    return np.where(np.isnan(held[:, :1]), np.inf, bound)


def _stage_parts(
    workload: Workload, placement: str, v_pp: int, l_pp: int, variant: Variant
) -> tuple[float, float, float, float]:
    """Layers of the largest encoder stage, of the LLM's first, largest and last pipeline rank."""
    num_layers = workload.spec.llm.num_layers
    if (l_pp == 1 and variant.num_chunks > 1) or l_pp * variant.num_chunks > num_layers:
        return (np.nan,) * 4
    vision, llm = layers_of(workload, Layout(placement, 1, v_pp, 1, 1, l_pp, 1, 1), variant)
    ranks = [sum(llm[rank::l_pp]) for rank in range(l_pp)]
    return float(max(vision)), float(ranks[0]), float(max(ranks)), float(ranks[-1])
