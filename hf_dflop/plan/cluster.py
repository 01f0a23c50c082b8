"""The machines that a plan is made for: nodes, GPUs, links.

In: a preset's name or data-sheet numbers. Out: bytes and FLOP/s of each rank, seconds of sends and reductions (it is a
`Communication` for the simulator).

Assumptions: ranks fill nodes in their order, nodes of one kind come one after another; a node's links are alike; a
model reaches `achieved` of the peak FLOP/s whatever it computes, unless a measured cost model says more.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import PlanError
from hf_dflop.plan.network import Network

__all__ = ["GPUS", "Cluster", "Gpu", "NodeGroup"]

CLUSTER_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of device, by its data sheet.

    Raises:
        PlanError: a number that is not positive.
    """

    name: str
    memory_bytes: float
    peak_flops_per_s: float
    """Of dense bf16 matrix products."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To another GPU of the node, one way."""
    achieved: float = 0.45
    """Share of the peak that training reaches inside a layer."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "peak_flops_per_s", "memory_bytes_per_s", "link_bytes_per_s", "achieved"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise PlanError(f"{name} of {self.name} is {value}; it must be positive and finite.")
        if self.achieved > 1:
            raise PlanError(f"achieved of {self.name} is {self.achieved}; it is a share of the peak, at most 1.")

    @property
    def flops_per_s(self) -> float:
        """What training reaches."""
        return self.peak_flops_per_s * self.achieved


def _gpu(name: str, gib: float, teraflops: float, memory_gb_per_s: float, link_gb_per_s: float) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=gib * 2**30,
        peak_flops_per_s=teraflops * 1e12,
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        link_bytes_per_s=link_gb_per_s * 1e9,
    )


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # memory that PyTorch sees (GiB), dense bf16 TFLOP/s, memory GB/s, link GB/s one way; from the data sheets
        _gpu("A100-40GB", 39.4, 312, 1555, 300),
        _gpu("A100-80GB", 79.2, 312, 2039, 300),
        _gpu("H100-80GB", 79.2, 989, 3350, 450),
        _gpu("H200-141GB", 139.8, 989, 4800, 450),
        _gpu("B200-180GB", 178.0, 2250, 8000, 900),
        _gpu("L40S-48GB", 44.5, 362, 864, 32),
        _gpu("A10-24GB", 22.2, 125, 600, 32),
        _gpu("RTX4090-24GB", 23.6, 165, 1008, 32),
        _gpu("MI300X-192GB", 191.0, 1307, 5300, 448),
    )
}
"""Presets by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGroup:
    """Nodes of one kind of GPU."""

    nodes: int
    gpu: Gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes with the same number of GPUs each.

    Args:
        nodes (`int`): nodes, where all have one kind of GPU.
        gpus_per_node (`int`): GPUs of each node.
        gpu (`str` or [`Gpu`]): name of a preset of `GPUS`, or a device of your own.
        groups (`Sequence[NodeGroup]`, *optional*): mixed kinds, in the order of their ranks, instead of nodes and gpu.
        inter_bytes_per_s (`float`): from one GPU to one of another node, one way.
        latency_s (`float`): of every message.
        price_per_gpu_hour (`float`, *optional*): money, any currency.

    Raises:
        PlanError: an unknown preset, or a number that is not usable.

    Example:
        >>> cluster = Cluster(nodes=2, gpus_per_node=8, gpu="H100-80GB")
        >>> cluster.num_gpus, cluster.gpu_of(9).name
        (16, 'H100-80GB')
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: Any = "H100-80GB"
    groups: tuple[NodeGroup, ...] = ()
    inter_bytes_per_s: float = 50e9
    latency_s: float = 10e-6
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        gpu = self.gpu
        if isinstance(gpu, str):
            if gpu not in GPUS:
                raise PlanError(f"there is no GPU preset {gpu!r}; use one of {', '.join(GPUS)}, or a Gpu of your own.")
            gpu = GPUS[gpu]
            object.__setattr__(self, "gpu", gpu)
        groups = tuple(self.groups) or (NodeGroup(nodes=self.nodes, gpu=gpu),)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "nodes", sum(group.nodes for group in groups))
        for name, value in (("nodes", self.nodes), ("gpus_per_node", self.gpus_per_node)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name} is {value!r}; it must be a whole number >= 1.")
        if any(group.nodes < 1 for group in groups):
            raise PlanError("a group of nodes has none; leave it out.")
        if self.price_per_gpu_hour is not None and not self.price_per_gpu_hour >= 0:
            raise PlanError(f"price_per_gpu_hour is {self.price_per_gpu_hour}; it must be >= 0.")
        self.network  # noqa: B018  (checks the bandwidths)

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def network(self) -> Network:
        """Links as the simulator asks for them; inside a node the slowest kind's."""
        return Network(
            intra_bytes_per_s=min(group.gpu.link_bytes_per_s for group in self.groups),
            inter_bytes_per_s=self.inter_bytes_per_s,
            gpus_per_node=self.gpus_per_node,
            latency_s=self.latency_s,
        )

    def gpu_of(self, rank: int) -> Gpu:
        """The device of a rank."""
        node = rank // self.gpus_per_node
        for group in self.groups:
            if node < group.nodes:
                return group.gpu
            node -= group.nodes
        raise PlanError(f"rank {rank} is beyond the {self.num_gpus} GPUs of the cluster.")

    @property
    def reference(self) -> Gpu:
        """The fastest kind: seconds are computed for it, and slower ranks take longer."""
        return max((group.gpu for group in self.groups), key=lambda gpu: gpu.flops_per_s)

    def slowdown(self) -> npt.NDArray[np.float64]:
        """How many times the reference's seconds each rank takes, `(num_gpus,)`."""
        return self._per_rank([self.reference.flops_per_s / group.gpu.flops_per_s for group in self.groups])

    def memory(self) -> npt.NDArray[np.float64]:
        """Bytes of each rank, `(num_gpus,)`."""
        return self._per_rank([group.gpu.memory_bytes for group in self.groups])

    def _per_rank(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        return np.repeat(values, [group.nodes * self.gpus_per_node for group in self.groups])

    def to_dict(self) -> dict[str, Any]:
        """The cluster as plain JSON types, with the schema version."""
        fields = asdict(self)
        del fields["nodes"], fields["gpu"]
        return {"schema_version": CLUSTER_SCHEMA_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Cluster":
        """Inverse of `to_dict`; a hand-written one may give `nodes` and `gpu` (a preset's name) instead of groups.

        Raises:
            PlanError: another schema version, or fields that are missing, unknown or not usable.
        """
        fields = dict(data)
        version = fields.pop("schema_version", CLUSTER_SCHEMA_VERSION)
        if version != CLUSTER_SCHEMA_VERSION:
            raise PlanError(f"the cluster has schema version {version!r}; hf_dflop reads {CLUSTER_SCHEMA_VERSION}.")
        try:
            if isinstance(fields.get("gpu"), Mapping):
                fields["gpu"] = Gpu(**fields["gpu"])
            groups = []
            for group in fields.pop("groups", ()):
                gpu = group["gpu"]
                gpu = GPUS[gpu] if isinstance(gpu, str) else Gpu(**gpu)
                groups.append(NodeGroup(nodes=group["nodes"], gpu=gpu))
            return cls(groups=tuple(groups), **fields)
        except (KeyError, TypeError) as error:
            raise PlanError(f"the cluster is not readable ({error}).") from error

    @classmethod
    def load(cls, path: str | Path) -> "Cluster":
        """Read a cluster from JSON; raises what `from_dict` raises."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
