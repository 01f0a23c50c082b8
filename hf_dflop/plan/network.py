"""Seconds of sending and reducing, between ranks of one node and of several.

In: bytes and ranks. Out: seconds, latency + bytes ÷ bandwidth; a ring for reductions.

Assumptions: ranks fill nodes in their order; a transfer has its link to itself; a ring is as fast as its slowest link.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hf_dflop.errors import PlanError

__all__ = ["Communication", "Network"]


class Communication(Protocol):
    """What the simulator asks of a cluster."""

    def send_s(self, num_bytes: Any, sender: Any, receiver: Any) -> Any:
        """Seconds until `num_bytes` of rank `sender` are on rank `receiver`; numbers, or arrays of messages."""

    def all_reduce_s(self, num_bytes: Any, ranks: Sequence[int]) -> Any:
        """Seconds to sum `num_bytes` (as above) over ranks; gathering or scattering them takes half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Bandwidth and latency of the links.

    Example:
        >>> network = Network(intra_bytes_per_s=100e9, inter_bytes_per_s=10e9, gpus_per_node=2)
        >>> network.send_s(1e9, 0, 1), network.send_s(1e9, 1, 2), network.all_reduce_s(1e9, [0, 1])
        (0.01, 0.1, 0.01)

    Raises:
        PlanError: a bandwidth that is not positive, or a negative latency.
    """

    intra_bytes_per_s: float
    """Between two ranks of a node, one way."""
    inter_bytes_per_s: float
    """Between two ranks of different nodes, one way."""
    gpus_per_node: int = 8
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("intra_bytes_per_s", "inter_bytes_per_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise PlanError(f"{name} is {value}; a bandwidth must be positive and finite.")
        if not (np.isfinite(self.latency_s) and self.latency_s >= 0) or self.gpus_per_node < 1:
            raise PlanError(
                f"latency_s is {self.latency_s}, gpus_per_node {self.gpus_per_node}; they must be >= 0 and >= 1."
            )

    def _bytes_per_s(self, ranks: Sequence[int]) -> float:
        first = ranks[0] // self.gpus_per_node
        ends = (ranks[-1],) if isinstance(ranks, range) else ranks
        one_node = all(rank // self.gpus_per_node == first for rank in ends)
        return self.intra_bytes_per_s if one_node else self.inter_bytes_per_s

    def send_s(self, num_bytes: Any, sender: Any, receiver: Any) -> Any:
        """See `Communication`."""
        sender, receiver = np.asarray(sender), np.asarray(receiver)
        one_node = sender // self.gpus_per_node == receiver // self.gpus_per_node
        bandwidth = np.where(one_node, self.intra_bytes_per_s, self.inter_bytes_per_s)
        seconds = np.where(sender == receiver, 0.0, self.latency_s + num_bytes / bandwidth)
        return seconds if seconds.ndim else float(seconds)

    def all_reduce_s(self, num_bytes: Any, ranks: Sequence[int]) -> Any:
        """See `Communication`."""
        size = len(ranks)
        if size < 2:
            return 0.0
        return 2 * (size - 1) * (self.latency_s + num_bytes / size / self._bytes_per_s(ranks))
