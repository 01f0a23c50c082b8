"""All the ways to lay a model out on a cluster that the planner chooses from.

In: a `ModelSpec` and a `Cluster`. Out: `Layout`s: degrees of the two modules on all GPUs of the cluster; what a plan
adds (microbatches, schedule, recomputation) comes later, for the layouts that are worth it.

    replicated   every rank has the whole model (DDP), or a shard of it (FSDP over all, HSDP over a node)
    colocated    the encoder on the ranks of the LLM's first stage, pipeline of 2 and more
    disjoint     encoder and LLM on their own ranks, each with its own tp, pp, dp

Assumptions: tensor parallelism stays inside a node, and divides heads, KV heads and MLP widths (an encoder's heads may
be padded); all GPUs are used. On more than 128 GPUs the encoder has whole nodes of its own, or none.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import ModelSpec, TransformerSpec
from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.padded_heads import can_pad

__all__ = ["PLACED", "Layout", "LayoutTable", "layouts", "tensor_degrees"]

MANY_GPUS = 128
"""A cluster of more gives the encoder whole nodes."""
PLACED = ("replicated", "colocated", "disjoint")
"""Placements by the number that a `LayoutTable` gives them."""


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


@dataclass(frozen=True, slots=True, eq=False)
class LayoutTable:
    """Layouts as columns, `(num_layouts,)` int64 each: 16,384 GPUs have more than a million."""

    columns: npt.NDArray[np.int64]
    """`(8, num_layouts)`: the fields of `Layout`, the placement as its place in `PLACED`."""

    @classmethod
    def of(cls, found: Sequence[Layout]) -> "LayoutTable":
        """The columns of a list."""
        table = np.empty((8, len(found)), dtype=np.int64)
        code = {name: number for number, name in enumerate(PLACED)}
        for number, values in enumerate(zip(*found, strict=True)):
            table[number] = [code[name] for name in values] if number == 0 else values
        return cls(table)

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    def __getitem__(self, which: Any) -> "LayoutTable":
        return LayoutTable(self.columns[:, which])

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """One field of all layouts."""
        return self.columns[Layout._fields.index(name)]

    def looked_up(self, names: Sequence[str], make: Callable[..., Any]) -> npt.NDArray[np.float64]:
        """`make(*values)` for each combination of these columns, made once: `(num_layouts, ...)`."""
        columns = [self.column(name) for name in names]
        code = np.zeros(len(self), dtype=np.int64)
        for column in columns:
            code = code * (int(column.max(initial=0)) + 1) + column
        known = np.flatnonzero(np.bincount(code))
        where = np.zeros(int(code.max(initial=0)) + 1, dtype=np.int64)
        where[code] = np.arange(len(self))  # a layout of each combination
        made = [make(*(int(column[where[one]]) for column in columns)) for one in known]
        where[known] = np.arange(known.size)
        return np.array(made, dtype=np.float64)[where[code]]

    @property
    def is_disjoint(self) -> npt.NDArray[np.bool_]:
        return self.columns[0] == PLACED.index("disjoint")

    @property
    def depth(self) -> npt.NDArray[np.int64]:
        """Ranks of a pipeline."""
        return self.column("l_pp") + np.where(self.is_disjoint, self.column("v_pp"), 0)

    def layout(self, place: int) -> Layout:
        """One of them."""
        placement, *degrees = self.columns[:, place].tolist()
        return Layout(PLACED[placement], *degrees)


def tensor_degrees(spec: TransformerSpec, gpus_per_node: int, *, pad_heads: bool = False) -> list[int]:
    """Tensor-parallel degrees that divide a node and the module's widths: powers of two. `pad_heads`: heads that are
    not divisible may be filled up (see `padded_heads`)."""
    widths = [spec.intermediate]
    if spec.num_moe_layers:
        widths += [spec.expert_intermediate, *([spec.shared_intermediate] if spec.shared_intermediate else [])]
    degrees, tp = [], 1
    while tp <= gpus_per_node:
        whole = spec.heads % tp == spec.kv_heads % tp == 0 or (pad_heads and can_pad(spec, tp))
        if whole and gpus_per_node % tp == 0 and all(width % tp == 0 for width in widths):
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


def _shares(total: int, node: int) -> list[int]:
    """GPUs of the encoder that are tried: all numbers on a small cluster; on one of more than `MANY_GPUS` whole nodes,
    with steps of at most a 16th of the smaller side."""
    if total <= MANY_GPUS:
        return list(range(1, total))
    found, size = [], node
    while size <= total // 2:
        found.append(size)
        size += node * max(1, 2 ** int(np.log2(max(1, size // (16 * node)))))
    return sorted({*found, *(total - size for size in found)})


def layouts(spec: ModelSpec, cluster: Cluster, global_batch_size: int) -> Iterator[Layout]:
    """Every layout that has a sample for each LLM replica, the plain ones first."""
    total, node = cluster.num_gpus, cluster.gpus_per_node
    vision_degrees = tensor_degrees(spec.vision, node, pad_heads=True)
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
    for num_vision in _shares(total, node):
        for l_tp, l_pp, l_dp in _triples(total - num_vision, llm_degrees, spec.llm.num_layers):
            # a tensor-parallel group must not lie across two nodes
            if l_dp > global_batch_size or (total > node and num_vision % l_tp):
                continue
            for v_tp, v_pp, v_dp in _triples(num_vision, vision_degrees, spec.vision.num_layers):
                yield Layout("disjoint", v_tp, v_pp, v_dp, l_tp, l_pp, l_dp, 1)
