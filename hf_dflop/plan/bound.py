"""What no plan of a layout can go below, for all layouts at once.

In: layouts, the sums of a workload, recomputation and stages per rank, the fewest microbatches that are tried. Out:
seconds of each batch. A step is at least as long as

    load      the mean over its replicas of what the busiest pipeline rank computes, tensor-parallel sums included
    way       the dearest sample's way through all stages

both of which hold for any composition of microbatches, any order and any schedule: padding, idling and other
communication only add to it. Layers are split as the plan would split them, so a bound holds for its own variant
alone; that of a layout is the least of its variants. A test compares it with the score of every plan of small spaces.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.padded_heads import encoder_share
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
) -> FloatArray:
    """Lower bounds `(num_layouts, num_batches)`, seconds; inf where the variant does not exist.

    Args:
        workload (`Workload`), cluster (`Cluster`): for which.
        found (`LayoutTable` or `Sequence[Layout]`): layouts.
        variant (`Variant`): recomputation and chunks.
        counts: one number or `(num_layouts,)`: microbatches of a replica, or fewer.
        wire_bytes (`int`): bytes of a number that is summed over tensor-parallel ranks.
    """
    found = found if isinstance(found, LayoutTable) else LayoutTable.of(found)
    spec = workload.spec
    again = (variant.vision_checkpointing, variant.llm_checkpointing)
    sums = workload.sums(*again)
    vision_s, llm_s, head_s, positions, tokens = (sums[:, k][None] for k in range(5))
    v_tp, _, v_dp, l_tp, l_pp, l_dp, _ = (column[:, None] for column in found.columns[1:].astype(np.float64))
    disjoint = found.is_disjoint[:, None]
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
    load = np.maximum(
        np.where(disjoint, vision / v_dp, 0.0),
        np.where(
            l_pp == 1,
            (first + head_s / l_tp) / l_dp,
            np.maximum(np.maximum(first, l_most * llm_layer), last) / l_dp,
        ),
    )
    bound = np.maximum(load, found.looked_up(("v_tp", "l_tp"), lambda v, t: workload.longest(*again, v, t)))
    return np.where(np.isnan(v_layers), np.inf, bound)


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
