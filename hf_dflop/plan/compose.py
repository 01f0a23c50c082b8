"""The microbatches of a workload's batches under a layout, remembered: many plans share them.

In: replicas, number of microbatches, what one encoder second weighs against one LLM second. Out: for each batch a
`Composition`: seconds and counts of every microbatch, from which the stages of any plan follow by multiplication.

Composed by `hf_dflop.balance.assign`, which the sampler runs. The weight is rounded to a half power of two, so that
plans that differ little share a composition; seconds are not rounded.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import assign
from hf_dflop.plan.stage_seconds import Groups, SampleSeconds, share_images
from hf_dflop.plan.step import stock_groups
from hf_dflop.plan.workload import Workload
from hf_dflop.shapes import Shapes

__all__ = ["Composer", "Composition"]

FloatArray = npt.NDArray[np.float64]
PROPOSALS_PER_MICROBATCH = 100
"""Changes that the balancer tries while plans are compared; the sampler tries more."""


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
    forward_from: Any
    backward_from: Any


class Composer:
    """Composes and remembers."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._groups = lru_cache(maxsize=4096)(self._compose)
        self.composition = lru_cache(maxsize=1024)(self._composition)

    def _compose(
        self, batch: int, again: tuple[bool, bool], replicas: int, num: int, objective: str, weight: int, balance: bool
    ) -> Groups:
        seconds = self.workload.seconds(*again)[batch]
        stock = stock_groups(seconds.vision.size, replicas, num)
        if not balance or replicas * num == 1:
            return stock
        vision, llm = seconds.vision, seconds.llm
        if objective == "pipeline":
            vision = vision * 2.0 ** (weight / 2)
        elif objective == "joined":  # on one rank, one after the other
            objective, vision, llm = "pipeline", np.zeros_like(llm), vision + llm
        return assign(
            vision,
            llm,
            num_ranks=replicas,
            num_slots=num,
            objective=objective,
            padded=self.workload.padded,
            baseline=stock,
            proposals=PROPOSALS_PER_MICROBATCH * replicas * num,
        ).groups

    def _composition(
        self,
        batch: int,
        again: tuple[bool, bool],
        replicas: int,
        num: int,
        objective: str,
        weight: int,
        balance: bool,
        encoders: int,
        own: bool,
    ) -> Composition:
        """Of one batch. `objective`: one of the balancer's, or "joined" (encoder and LLM's first stage on one rank);
        `weight`: of an encoder second, in half powers of two; `own`: every replica encodes its own images."""
        groups = self._groups(batch, again, replicas, num, objective, weight, balance)
        shapes = self.workload.batches[batch]
        return composition(
            self.workload.seconds(*again)[batch], shapes, groups, encoders, own=own, padded=self.workload.padded,
            class_tokens=self.workload.spec.class_tokens,
        )  # fmt: skip


def composition(
    seconds: SampleSeconds,
    shapes: Shapes,
    groups: Groups,
    encoders: int,
    *,
    own: bool,
    padded: bool,
    class_tokens: int = 0,
) -> Composition:
    """Seconds and counts of the microbatches `groups`."""
    replicas, num = len(groups), len(groups[0])
    flat = [np.asarray(groups[d][m], dtype=np.int64) for d in range(replicas) for m in range(num)]
    sizes = np.array([group.size for group in flat])
    order = np.concatenate(flat)
    place = np.empty(len(shapes), dtype=np.int64)
    place[order] = np.repeat(np.arange(replicas * num), sizes)
    owner, forward_from, backward_from = share_images(shapes, groups, encoders, own=own)
    has = owner >= 0
    encoder_place = owner[has] * num + place[has] % num

    def of_llm(values: npt.NDArray[Any]) -> FloatArray:
        if not padded:
            return _sums(place, values, (replicas, num))
        most = np.zeros(replicas * num)
        np.maximum.at(most, place, values)
        return (most * sizes).reshape(replicas, num)

    def of_encoder(values: npt.NDArray[Any]) -> FloatArray:
        return _sums(encoder_place, values[has], (encoders, num))

    return Composition(
        vision=np.stack([of_encoder(seconds.vision_forward), of_encoder(seconds.vision_backward)]),
        llm=np.stack([of_llm(seconds.llm_forward), of_llm(seconds.llm_backward)]),
        head=np.stack([of_llm(seconds.head_forward), of_llm(seconds.head_backward)]),
        positions=of_encoder(shapes.image_patches + class_tokens * shapes.image_tiles),
        tokens=of_llm(shapes.llm_tokens),
        image_tokens=_sums(place, shapes.image_tokens, (replicas, num)),
        forward_from=forward_from,
        backward_from=backward_from,
    )


def _sums(place: npt.NDArray[np.int64], values: npt.NDArray[Any], shape: tuple[int, int]) -> FloatArray:
    """Sum of the values at each place, `shape`."""
    return np.bincount(place, values, shape[0] * shape[1]).reshape(shape).astype(np.float64)
