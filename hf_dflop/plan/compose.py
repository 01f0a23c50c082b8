"""The microbatches of a workload's batches under a layout, remembered: many plans share them.

In: replicas, number of microbatches, what one encoder second weighs against one LLM second. Out: for each batch a
`Composition`: seconds and counts of every microbatch, from which the stages of any plan follow by multiplication.

Composed by the code of `hf_dflop.balance.assign`, which the sampler runs, with fewer proposals. Plans that differ
little share a composition: the weight of an encoder second is rounded to a half power of two where encoder and LLM
have their own ranks, and to a hundredth where they share them. Seconds are not rounded.

A batch of more than `MAX_TOGETHER` samples is composed in parts: replicas in equal shares, each with every k-th
sample by size. So the planner's time grows with the samples and not with their square. The first
parts can be had by themselves (`first_parts`): their replicas are those of the whole, so that what they take bounds
what all take.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from hf_dflop.balance.assign import assign_flat
from hf_dflop.plan.stage_seconds import SampleSeconds, share_places, stock_flat
from hf_dflop.plan.workload import Workload
from hf_dflop.shapes import Shapes

__all__ = ["Composer", "Composition", "Weight"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
PROPOSALS_PER_MICROBATCH = 100
"""Changes that the balancer tries while plans are compared; the sampler tries more."""
MAX_PROPOSALS = 10_000
"""Of one batch, so that a composition for thousands of GPUs does not take seconds."""
MAX_TOGETHER = 1024
KEPT_BYTES = 96 * 2**20
"""Of compositions, and of groupings, that are remembered."""
Weight = float
"""Of an encoder second against an LLM second, both without recomputation."""
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Composition:
    """A batch in microbatches. V encoder replicas, D LLM replicas, M microbatches."""

    vision: FloatArray
    """`(2, V, M)`: seconds of the whole encoder, forward and backward, on one GPU."""
    llm: FloatArray
    """`(2, D, M)`: of all LLM layers."""
    head: FloatArray
    """`(2, D, M)`: of the LM head."""
    positions: FloatArray
    """`(V, M)`: encoder positions."""
    tokens: FloatArray
    """`(D, M)`: LLM tokens, with padding."""
    image_tokens: FloatArray
    """`(D, M)`."""
    largest: tuple[FloatArray, FloatArray]
    """`(M,)` each: the most encoder positions, and LLM tokens, that the k + 1 largest microbatches of a replica have
    together."""
    forward_from: Any
    backward_from: Any

    @property
    def num_bytes(self) -> int:
        arrays = (self.vision, self.llm, self.head, self.positions, self.tokens, self.image_tokens)
        return sum(one.nbytes for one in (*arrays, self.forward_from, self.backward_from))


class _Remembered(Generic[Value]):
    """What was made last, within `KEPT_BYTES`."""

    def __init__(self, make: Callable[..., Value], size: Callable[[Value], int]) -> None:
        self._make, self._size = make, size
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        self._bytes = 0

    def __call__(self, *key: Any) -> Value:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = self._make(*key)
        self._bytes += self._size(made)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._size(self._kept.popitem(last=False)[1])
        return made


class Composer:
    """Composes and remembers."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._columns = lru_cache(maxsize=None)(self._seconds)
        self._order = lru_cache(maxsize=8)(self._by_size)
        self._parts = _Remembered(self._part, lambda part: part[0].nbytes + part[1].nbytes)
        self._groups = _Remembered(self._compose, lambda group: group.nbytes)
        self.composition = _Remembered(self._composition, lambda made: made.num_bytes)
        self.first_parts = _Remembered(self._first_parts, lambda made: made.num_bytes)

    def num_parts(self, replicas: int) -> int:
        """Parts that a batch is composed in."""
        return min(replicas, -(-len(self.workload.batches[0]) // MAX_TOGETHER))

    def _seconds(self, batch: int) -> tuple[FloatArray, FloatArray]:
        """Of each sample in encoder and LLM, without recomputation."""
        seconds = self.workload.seconds(False, False)[batch]
        return seconds.vision, seconds.llm

    def _by_size(self, batch: int, weight: Weight) -> IntArray:
        """The samples of a batch, the dearest first."""
        vision, llm = self._columns(batch)
        return np.argsort(-(weight * vision + llm), kind="stable")

    def _part(
        self, batch: int, replicas: int, num: int, objective: str, weight: Weight, part: int
    ) -> tuple[IntArray, IntArray]:
        """Samples of a part, ascending, and microbatch × the part's replicas + replica of each."""
        vision, llm = self._columns(batch)
        parts = self.num_parts(replicas)
        first, last = _replicas_of(part, replicas, parts)
        own = np.arange(llm.size)
        if parts > 1:
            own = _dealt(self._order(batch, weight), replicas, first, last)
        vision, llm = weight * vision[own], llm[own]
        if objective == "joined":  # on one rank, one after the other
            objective, vision, llm = "pipeline", np.zeros_like(llm), vision + llm
        found = assign_flat(
            vision,
            llm,
            stock_flat(own.size, (last - first) * num),
            num_ranks=last - first,
            num_slots=num,
            objective=objective,
            padded=self.workload.padded,
            proposals=min(MAX_PROPOSALS // parts, PROPOSALS_PER_MICROBATCH * (last - first) * num),
            kicks=None if parts == 1 else 0,
        )
        return own, found

    def _compose(self, batch: int, replicas: int, num: int, objective: str, weight: Weight, balance: bool) -> IntArray:
        """Microbatch × replicas + replica of each sample."""
        size = len(self.workload.batches[batch])
        if not balance or replicas * num == 1:
            return stock_flat(size, replicas * num)
        group = np.empty(size, dtype=np.int64)
        own, found = self._joined(batch, replicas, num, objective, weight, self.num_parts(replicas))
        group[own] = found
        return group

    def _joined(
        self, batch: int, replicas: int, num: int, objective: str, weight: Weight, count: int
    ) -> tuple[IntArray, IntArray]:
        """Samples of the first `count` parts, and microbatch × their replicas + replica of each."""
        parts = self.num_parts(replicas)
        total = _replicas_of(count - 1, replicas, parts)[1]
        samples, groups = [], []
        for part in range(count):
            own, found = self._parts(batch, replicas, num, objective, weight, part)
            first, last = _replicas_of(part, replicas, parts)
            slot, rank = np.divmod(found, last - first)
            samples.append(own)
            groups.append(slot * total + first + rank)
        return np.concatenate(samples), np.concatenate(groups)

    def _composition(
        self,
        batch: int,
        again: tuple[bool, bool],
        replicas: int,
        num: int,
        objective: str,
        weight: Weight,
        balance: bool,
        encoders: int,
        own: bool,
    ) -> Composition:
        """Of one batch. `objective`: one of the balancer's, or "joined" (encoder and LLM's first stage on one rank);
        `own`: every replica encodes its own images."""
        return composition(
            self.workload.seconds(*again)[batch],
            self.workload.batches[batch],
            self._groups(batch, replicas, num, objective, weight, balance),
            replicas,
            num,
            encoders,
            own=own,
            padded=self.workload.padded,
            class_tokens=self.workload.spec.class_tokens,
        )

    def _first_parts(
        self,
        batch: int,
        again: tuple[bool, bool],
        replicas: int,
        num: int,
        objective: str,
        weight: Weight,
        count: int,
    ) -> Composition:
        """Of the replicas of the first `count` parts alone, balanced, as if each encoded its own images."""
        own, found = self._joined(batch, replicas, num, objective, weight, count)
        total = _replicas_of(count - 1, replicas, self.num_parts(replicas))[1]
        return composition(
            self.workload.seconds(*again)[batch].select(own),
            self.workload.batches[batch].select(own),
            found,
            total,
            num,
            total,
            own=True,
            padded=self.workload.padded,
            class_tokens=self.workload.spec.class_tokens,
        )


def _replicas_of(part: int, replicas: int, parts: int) -> tuple[int, int]:
    """First and last + 1 replica of a part."""
    return -(-part * replicas // parts), -(-(part + 1) * replicas // parts)


def _dealt(order: IntArray, replicas: int, first: int, last: int) -> IntArray:
    """The samples of the replicas from `first` to before `last`, ascending. All are dealt to all replicas by size
    (`order`), there and back, as to players: every replica gets as many as it has microbatches at least."""
    turn = np.arange(-(-order.size // replicas))[:, None]
    seat = np.arange(first, last)
    place = (turn * replicas + np.where(turn % 2 == 0, seat, replicas - 1 - seat)).ravel()
    return np.sort(order[place[place < order.size]])


def composition(
    seconds: SampleSeconds,
    shapes: Shapes,
    group: IntArray,
    replicas: int,
    num: int,
    encoders: int,
    *,
    own: bool,
    padded: bool,
    class_tokens: int = 0,
) -> Composition:
    """Seconds and counts of microbatches; `group`: microbatch × replicas + replica of each sample."""
    order = np.argsort(group, kind="stable")
    owner, forward_from, backward_from = share_places(shapes, order, group[order], replicas, num, encoders, own=own)
    place = group % replicas * num + group // replicas
    has = owner >= 0
    encoder_place = owner[has] * num + group[has] // replicas

    def of_llm(values: npt.NDArray[Any]) -> FloatArray:
        if not padded:
            return _sums(place, values, (replicas, num))
        most = np.zeros(replicas * num)
        np.maximum.at(most, place, values)
        return (most * np.bincount(place, minlength=replicas * num)).reshape(replicas, num)

    def of_encoder(values: npt.NDArray[Any]) -> FloatArray:
        return _sums(encoder_place, values[has], (encoders, num))

    positions = of_encoder(shapes.image_patches + class_tokens * shapes.image_tiles)
    tokens = of_llm(shapes.llm_tokens)
    return Composition(
        vision=np.stack([of_encoder(seconds.vision_forward), of_encoder(seconds.vision_backward)]),
        llm=np.stack([of_llm(seconds.llm_forward), of_llm(seconds.llm_backward)]),
        head=np.stack([of_llm(seconds.head_forward), of_llm(seconds.head_backward)]),
        positions=positions,
        tokens=tokens,
        largest=(_largest_sums(positions), _largest_sums(tokens)),
        image_tokens=_sums(place, shapes.image_tokens, (replicas, num)),
        forward_from=forward_from,
        backward_from=backward_from,
    )


def _sums(place: npt.NDArray[np.int64], values: npt.NDArray[Any], shape: tuple[int, int]) -> FloatArray:
    """Sum of the values at each place, `shape`."""
    return np.bincount(place, values, shape[0] * shape[1]).reshape(shape).astype(np.float64)


def _largest_sums(counts: FloatArray) -> FloatArray:
    return np.cumsum(np.sort(counts, axis=1)[:, ::-1], axis=1).max(axis=0)
