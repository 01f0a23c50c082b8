"""The global batches that plans are compared on, and what of them does not depend on the layout.

In: shapes of a dataset, a global batch size, a cost model. Out: a `Workload`: the same few batches for every plan
(common random numbers), drawn with replacement, with the seconds of their samples under each way to train.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.cost import CostModel
from hf_dflop.errors import PlanError
from hf_dflop.plan.padded_heads import encoder_share
from hf_dflop.plan.plan import ModulePlan, Plan
from hf_dflop.plan.stage_seconds import SampleSeconds, sample_seconds, stock_flat
from hf_dflop.shapes import Shapes

__all__ = ["Workload", "draw_batches", "refuse_sounds"]

FloatArray = npt.NDArray[np.float64]


def draw_batches(shapes: Shapes, global_batch_size: int, num_batches: int, seed: int) -> list[Shapes]:
    """Bootstrap samples of a dataset, one per step.

    Raises:
        PlanError: no samples, or nothing to draw.
    """
    if not len(shapes):
        raise PlanError("the profile has no samples; profile a dataset with at least one usable row.")
    refuse_sounds(shapes)
    if isinstance(global_batch_size, bool) or global_batch_size < 1 or num_batches < 1:
        raise PlanError(
            f"global_batch_size is {global_batch_size}, num_batches {num_batches}; both must be at least 1."
        )
    random = np.random.default_rng(seed)
    return [shapes.select(random.integers(len(shapes), size=global_batch_size)) for _ in range(num_batches)]


def refuse_sounds(shapes: Shapes) -> None:
    """Raise `PlanError` if any sample has a sound."""
    if number := int((shapes.num_audios > 0).sum()):
        raise PlanError(
            f"{number} samples have sounds; plans do not place an audio encoder. Balance such a model with "
            "DflopCallback, or plan for the samples without sounds."
        )


class Workload:
    """Global batches with their samples' seconds.

    Args:
        cost (`CostModel`): of the model, on the cluster's reference GPU.
        batches (`list[Shapes]`): the samples of each step.
        frozen (`tuple[str, ...]`), cached_features (`bool`), padded (`bool`): as in a [`Plan`].
    """

    def __init__(
        self,
        cost: CostModel,
        batches: list[Shapes],
        *,
        frozen: tuple[str, ...] = (),
        cached_features: bool = False,
        padded: bool = False,
    ) -> None:
        self.cost, self.batches = cost, batches
        self.frozen, self.cached_features, self.padded = frozen, cached_features, padded
        self.seconds = lru_cache(maxsize=None)(self._seconds)
        self.sums = lru_cache(maxsize=None)(self._sums)
        self.busiest = lru_cache(maxsize=4096)(self._busiest)
        self.longest = lru_cache(maxsize=None)(self._longest)
        self.extra_layers = lru_cache(maxsize=None)(self._extra_layers)

    @property
    def spec(self) -> Any:
        return self.cost.spec

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    def _seconds(self, vision_again: bool, llm_again: bool) -> list[SampleSeconds]:
        """Seconds of each batch's samples; `again`: with recomputation."""
        spec = self.cost.spec
        plan = Plan(
            placement="replicated",
            vision=ModulePlan(layers=(spec.vision.num_layers,), checkpointing=vision_again),
            llm=ModulePlan(layers=(spec.llm.num_layers,), checkpointing=llm_again),
            num_microbatches=1,
            frozen=self.frozen,
            cached_features=self.cached_features,
        )
        return [sample_seconds(plan, self.cost, batch) for batch in self.batches]

    def _sums(self, vision_again: bool, llm_again: bool) -> FloatArray:
        """`(num_batches, 5)`: seconds of encoder, LLM layers, LLM head; encoder positions, LLM tokens."""
        rows = []
        for shapes, s in zip(self.batches, self.seconds(vision_again, llm_again), strict=True):
            llm = s.llm_forward.sum() + s.llm_backward.sum()
            head = s.head_forward.sum() + s.head_backward.sum()
            positions = shapes.image_tokens.sum() * self.spec.connector.merge
            rows.append((s.vision.sum(), llm, head, positions, shapes.llm_tokens.sum()))
        return np.array(rows, dtype=np.float64)

    def _busiest(
        self, vision_again: bool, llm_again: bool, replicas: int, num_microbatches: int, joined: bool
    ) -> FloatArray:
        """`sums` as they would be, had all replicas what the busiest has of microbatches as the stock sampler deals
        them, `(num_batches, 5)`. `joined`: it encodes its own images."""
        rows = []
        num_groups = replicas * num_microbatches
        for shapes, s in zip(self.batches, self.seconds(vision_again, llm_again), strict=True):
            if len(shapes) < num_groups:
                return self.sums(vision_again, llm_again)
            replica = stock_flat(len(shapes), num_groups) % replicas
            positions = shapes.image_tokens * self.spec.connector.merge
            layers, head = s.llm_forward + s.llm_backward, s.head_forward + s.head_backward
            columns = (s.vision, layers, head, positions, shapes.llm_tokens)
            own = np.array([np.bincount(replica, values, replicas) for values in columns])
            most = (own[0] * joined + own[1] + own[2]).argmax()
            rows.append(replicas * own[:, most])
        return np.array(rows)

    def _extra_layers(self, vision_again: bool, llm_again: bool) -> tuple[float, float]:
        """Work of the whole encoder and of the LM head, in LLM layers."""
        vision, llm, head = self.sums(vision_again, llm_again)[:, :3].sum(axis=0).tolist()
        layer = llm / self.spec.llm.num_layers
        return (vision / layer, head / layer) if layer > 0 else (0.0, 0.0)

    def _longest(self, vision_again: bool, llm_again: bool, v_tp: int, l_tp: int) -> FloatArray:
        """`(num_batches,)`: the dearest sample's way through the whole model, one stage after the other.

        Of a backward only half, the input's gradient: the weights' may be put off until no stage waits for it.
        """
        ways = []
        for s in self.seconds(vision_again, llm_again):
            vision = s.vision_forward + s.vision_backward / 2
            llm = s.llm_forward + s.head_forward + (s.llm_backward + s.head_backward) / 2
            ways.append((vision * encoder_share(self.spec, v_tp) + llm / l_tp).max())
        return np.array(ways)
