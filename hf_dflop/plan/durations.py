"""What every action of a step takes: the simulator's input, beside the order.

In: seconds of forward and backward for each stage, replica and microbatch, of transfers, data and gradient reduction.
Out: a checked `Durations`.

Replicas: an encoder with V replicas may feed an LLM with D. The images of a microbatch's D parts are then joined and
cut evenly into V parts, so that a replica of the encoder feeds those LLM replicas whose part it holds a piece of.

Assumptions: a transfer runs beside computation and takes its time from the sender's end on; transfers of one stage,
replica and direction follow one another, different ones do not slow each other down. Reduction of gradients runs
beside the last backward of its rank, except for its last bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import PlanError

__all__ = ["Durations"]

FloatArray = npt.NDArray[np.float64]
Rows = Sequence[Any] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Durations:
    """Seconds of a step's actions. Build it with `Durations.of`.

    S stages, R the most replicas that a stage has, M microbatches, P pipeline ranks.
    """

    num_replicas: npt.NDArray[np.int64]
    """`(S,)`, replicas of each stage."""
    seconds: FloatArray
    """`(4, S, R, M)`, of F, B, I, W (the order of `Kind`)."""
    transfer: FloatArray
    """`(2, S, R, M)`: from a stage to the next (0) and to the one before (1), by the sender's replica."""
    data_ready: FloatArray
    """`(R, M)`: seconds after the step's begin at which the m-th microbatch's data is there."""
    reduce_s: Any = 0.0
    """One number, or `(P,)`: gradient reduction over the replicas of a rank, were nothing hidden."""
    reduce_tail_s: Any = None
    """The same: the part that cannot be hidden (the last bucket); by default all of it."""
    optimizer_s: Any = 0.0
    """One number, or `(P,)`: clipping and the optimizer."""
    floor: FloatArray
    """`(4, S)`: the least seconds of an action, such as gathering its parameters (FSDP)."""
    lockstep: int = 1
    """Replicas that run every action together (FSDP shards); 1: each by itself."""
    bridge: int = -1
    """Stage whose replicas feed the next stage's by `forward_from`; -1: replica r feeds replica r everywhere."""
    forward_from: npt.NDArray[np.int64]
    """`(R, M, 2)`: first and last + 1 replica of `bridge` that a replica of the next stage gets features from."""
    backward_from: npt.NDArray[np.int64]
    """`(R, M, 2)`: the same for gradients, seen from a replica of `bridge`."""

    @classmethod
    def of(
        cls,
        forward_s: Rows,
        backward_s: Rows,
        *,
        weight_share: float | Sequence[float] = 0.5,
        transfer_s: Rows | None = None,
        gradient_transfer_s: Rows | None = None,
        data_ready_s: Any = None,
        reduce_s: Any = 0.0,
        reduce_tail_s: Any = None,
        optimizer_s: Any = 0.0,
        floor_forward_s: Any = 0.0,
        floor_backward_s: Any = 0.0,
        lockstep: int = 1,
        bridge: int | None = None,
        bridge_shares: Any = None,
        bridge_ranges: tuple[Any, Any] | None = None,
    ) -> "Durations":
        """Check and join the seconds of a step.

        Args:
            forward_s, backward_s:
                One entry per stage: `(num_replicas, num_microbatches)` seconds, or `(num_microbatches,)` for one
                replica. Stages of encoder and LLM may differ in their replicas.
            weight_share (`float` or one per stage): share of a backward that a split backward puts off (W).
            transfer_s, gradient_transfer_s (*optional*):
                One entry per stage but the last, as above: from stage s to s + 1, and back (by the replica of
                stage s + 1). By default nothing.
            data_ready_s (*optional*): `(num_replicas, num_microbatches)`, see the field; by default at once.
            reduce_s, reduce_tail_s, optimizer_s, lockstep: see the fields.
            floor_forward_s, floor_backward_s: one number or `(num_stages,)`, see `floor`.
            bridge (`int`, *optional*): see the field; by default where the number of replicas changes.
            bridge_shares (*optional*):
                `(num_replicas, num_microbatches)`: how much of a microbatch's images each replica after the bridge
                has; by default all the same.
            bridge_ranges (*optional*): `forward_from` and `backward_from` themselves, where they are known.

        Raises:
            PlanError: a number that is negative or not finite, or shapes that do not fit each other.
        """
        forward, backward = _rows(forward_s, "forward_s"), _rows(backward_s, "backward_s")
        shapes = [row.shape for row in forward]
        if not forward or shapes != [row.shape for row in backward]:
            raise PlanError(
                f"forward_s has the shapes {shapes} and backward_s {[row.shape for row in backward]}; they must be "
                "alike: (replicas, microbatches) for each stage."
            )
        if len({shape[1] for shape in shapes}) != 1 or not shapes[0][1]:
            raise PlanError(f"forward_s has the shapes {shapes}; every stage needs the same microbatches, 1 or more.")
        num_stages, num_microbatches = len(forward), shapes[0][1]
        num_replicas = np.array([shape[0] for shape in shapes], dtype=np.int64)
        most = int(num_replicas.max())
        share = np.broadcast_to(np.asarray(weight_share, dtype=np.float64), (num_stages,))
        if not ((share >= 0) & (share <= 1)).all():
            raise PlanError(f"weight_share is {weight_share}; it must lie in [0, 1].")
        seconds = np.zeros((4, num_stages, most, num_microbatches))
        for stage in range(num_stages):
            count = num_replicas[stage]
            seconds[0, stage, :count], seconds[1, stage, :count] = forward[stage], backward[stage]
            seconds[3, stage, :count] = share[stage] * backward[stage]
        seconds[2] = seconds[1] - seconds[3]
        transfer = np.zeros((2, num_stages, most, num_microbatches))
        for way, given in enumerate((transfer_s, gradient_transfer_s)):
            if given is None:
                continue
            rows = _rows(given, ("transfer_s", "gradient_transfer_s")[way])
            wanted = shapes[1:] if way else shapes[:-1]
            if [row.shape for row in rows] != wanted:
                raise PlanError(
                    f"{'gradient_transfer_s' if way else 'transfer_s'} has the shapes {[row.shape for row in rows]}; "
                    f"the senders' are {wanted}."
                )
            for stage, row in enumerate(rows, start=way):
                transfer[way, stage, : row.shape[0]] = row
        ready = np.zeros((most, num_microbatches))
        if data_ready_s is not None:
            ready[: num_replicas[0]] = _rows([data_ready_s], "data_ready_s")[0]
        floor = np.zeros((4, num_stages))
        floor[0] = floor_forward_s
        floor[1] = floor_backward_s
        floor[2] = floor[1]
        for name, value in (("floor", floor), ("reduce_s", reduce_s), ("optimizer_s", optimizer_s)):
            _rows([value], name)
        if isinstance(lockstep, bool) or lockstep < 1 or (lockstep > 1 and (num_replicas % lockstep).any()):
            raise PlanError(f"lockstep is {lockstep}; it must divide the {most} replicas.")
        at = _bridge(num_replicas) if bridge is None else bridge
        forward_from = np.zeros((most, num_microbatches, 2), dtype=np.int64)
        backward_from = np.zeros((most, num_microbatches, 2), dtype=np.int64)
        if at >= 0:
            senders, receivers = int(num_replicas[at]), int(num_replicas[at + 1])
            shares = np.ones((receivers, num_microbatches))
            if bridge_shares is not None:
                shares = _rows([bridge_shares], "bridge_shares")[0]
                if shares.shape != (receivers, num_microbatches):
                    raise PlanError(f"bridge_shares is {shares.shape}; it must be {(receivers, num_microbatches)}.")
            ranges = _pieces(shares, senders) if bridge_ranges is None else bridge_ranges
            forward_from[:receivers], backward_from[:senders] = ranges
        return cls(
            num_replicas=num_replicas,
            seconds=seconds,
            transfer=transfer,
            data_ready=ready,
            reduce_s=reduce_s,
            reduce_tail_s=reduce_tail_s,
            optimizer_s=optimizer_s,
            floor=floor,
            lockstep=int(lockstep),
            bridge=at,
            forward_from=forward_from,
            backward_from=backward_from,
        )

    @property
    def num_stages(self) -> int:
        return self.seconds.shape[1]

    @property
    def num_microbatches(self) -> int:
        return self.seconds.shape[3]


def _rows(given: Any, name: str) -> list[FloatArray]:
    rows = [np.atleast_2d(np.asarray(row, dtype=np.float64)) for row in given]
    for stage, row in enumerate(rows):
        if row.ndim != 2 or not np.isfinite(row).all() or (row < 0).any():
            found = row.shape if row.ndim != 2 else row[~(np.isfinite(row) & (row >= 0))][0]
            raise PlanError(
                f"{name}[{stage}] holds {found}; it must be (replicas, microbatches) of seconds, finite and >= 0. "
                "Check the cost model and that no bandwidth is 0."
            )
    return rows


def _bridge(num_replicas: npt.NDArray[np.int64]) -> int:
    """Where the number of replicas changes; -1: nowhere."""
    changes = np.flatnonzero(np.diff(num_replicas))
    if changes.size > 1:
        raise PlanError(
            f"the stages have {num_replicas.tolist()} replicas; the number may change once, between encoder and LLM."
        )
    return int(changes[0]) if changes.size else -1


def _pieces(shares: FloatArray, senders: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Replicas on the other side whose piece overlaps: `(receivers, M, 2)` and `(senders, M, 2)`."""
    receivers, num_microbatches = shares.shape
    total = shares.sum(axis=0)
    edges = np.zeros((receivers + 1, num_microbatches))
    np.cumsum(shares, axis=0, out=edges[1:])
    edges *= senders / np.where(total > 0, total, 1.0)
    low = np.floor(edges[:-1] + 1e-9).astype(np.int64)
    high = np.where(shares > 0, np.ceil(edges[1:] - 1e-9).astype(np.int64), low)
    forward = np.clip(np.stack([low, high], axis=-1), 0, senders)
    feeds = np.arange(senders)[:, None, None]  # (senders, receivers, M)
    overlap = (forward[None, :, :, 0] <= feeds) & (feeds < forward[None, :, :, 1])
    some = overlap.any(axis=1)
    first = overlap.argmax(axis=1)
    last = receivers - overlap[:, ::-1].argmax(axis=1)
    backward = np.stack([np.where(some, first, 0), np.where(some, last, 0)], axis=-1).astype(np.int64)
    return forward, backward
