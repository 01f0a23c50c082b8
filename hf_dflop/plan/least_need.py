"""What every plan of a layout needs of memory at least, for all layouts at once.

In: a `LayoutTable`, recomputation. Out: for each layout, needed ÷ available bytes of its fullest rank: of weights and
optimizer state, and of those with the activations of microbatches in flight. Above 1 no plan with this recomputation
fits, so that none need be made.

A lower limit: of a pipeline the first and last ranks of encoder and LLM are looked at, and of activations what layers
keep; microbatches are counted as if they were equal, as many and as small as the search tries, and as many in flight
as under 1F1B, than which no other schedule has fewer (a test compares). FSDP is left to the full answer.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.memory import StageLayers, stage_memory
from hf_dflop.plan.bound import Variant, end_layers
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.padded_heads import padded_encoder
from hf_dflop.plan.space import PLACED, LayoutTable
from hf_dflop.plan.workload import Workload

__all__ = ["LeastNeed"]

FloatArray = npt.NDArray[np.float64]
ROUNDING = 1e-9
"""By which a limit is lowered: it adds the same bytes as the full answer, in another sequence."""


_VISION = ("vision_layers", "vision_fixed", "connector")
_LLM = ("llm_layers", "llm_fixed", "llm_head")
"""Fields of `StageLayers`, by the degree that splits them."""


class _Part(NamedTuple):
    """Bytes of one part of the model on one tensor-parallel rank."""

    static: float
    kept: float
    """Per token of its module, from forward to backward."""
    traffic: float
    """That the optimizer reads and writes."""


class LeastNeed:
    """Lower limits on what layouts need.

    Args:
        workload (`Workload`): model and batches.
        rule (`MemoryRule`): formats and optimizer.
        room_bytes (`float`): bytes that a plan may use on the cluster's largest GPU.
    """

    def __init__(self, workload: Workload, rule: MemoryRule, room_bytes: float) -> None:
        self._workload, self._rule, self._room = workload, rule, room_bytes
        self._part = lru_cache(maxsize=None)(self._made)
        batches = workload.batches
        classes = workload.spec.class_tokens
        positions = [(batch.image_patches + classes * batch.image_tiles).sum() for batch in batches]
        self._positions = float(max(positions))
        self._tokens = float(max(batch.llm_tokens.sum() for batch in batches))

    def _made(self, again: tuple[bool, bool], name: str, tp: int) -> _Part:
        settings = self._rule.settings_of(self._workload.frozen, again, 1)
        one: Any = 1 if name.endswith("layers") else True
        spec = padded_encoder(self._workload.spec, tp) if name in _VISION else self._workload.spec
        held = stage_memory(spec, StageLayers(**{name: one}), settings, vision_tp=tp, llm_tp=tp)
        own = held.llm if name.startswith("llm") else held.vision
        traffic = 2 * held.optimizer_bytes + 2 * held.parameters_bytes + held.gradients_bytes
        return _Part(held.static_bytes, own.kept_per_token_bytes, traffic)

    def of(self, table: LayoutTable, variant: Variant, counts: Any) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Need of weights and state, need with activations, bytes that the optimizer moves; `(num_layouts,)` each.

        Args:
            table (`LayoutTable`), variant (`Variant`): layouts, recomputation, stages per rank.
            counts: `(num_layouts,)`, the most microbatches that are tried.
        """
        again = (variant.vision_checkpointing, variant.llm_checkpointing)
        _, v_pp, v_dp, _, l_pp, l_dp, shards = table.columns[1:]
        part = {
            name: table.looked_up((degree,), lambda tp, name=name: self._part(again, name, tp)).T
            for names, degree in ((_VISION, "v_tp"), (_LLM, "l_tp"))
            for name in names
        }
        v_first, v_last, l_first, l_last = end_layers(self._workload, table, variant)
        frozen = {"vision", "connector"} <= set(self._workload.frozen) or self._workload.cached_features
        disjoint, one_stage = table.is_disjoint, v_pp == 1
        encodes = 0.0 if self._workload.cached_features else 1.0
        tied = self._workload.spec.llm.tied_embeddings

        def ranks(what: int) -> tuple[FloatArray, ...]:
            """Of the encoder's first and last rank, the LLM's first and last: column `what`, without activations."""
            layer, fixed, connector = (part[name][what] for name in ("vision_layers", "vision_fixed", "connector"))
            llm, start, head = (part[name][what] for name in ("llm_layers", "llm_fixed", "llm_head"))
            head_here = 0.0 if tied else head
            inside = encodes * (layer * v_first + fixed) + connector  # on the LLM's first rank
            first = l_first * llm + start + np.where(disjoint, 0.0, inside)
            return (
                np.where(disjoint, layer * v_first + fixed + np.where(one_stage, connector, 0.0), 0.0),
                np.where(disjoint, layer * v_last + connector + np.where(one_stage, fixed, 0.0), 0.0),
                first + np.where(l_pp == 1, head_here, 0.0),
                np.where(l_pp == 1, 0.0, l_last * llm + head),
            )

        static = ranks(0)
        depth = table.depth
        positions = self._positions / v_dp / counts
        tokens = self._tokens / l_dp / counts
        kept_v, kept_l = part["vision_layers"][1], part["llm_layers"][1]

        def flying(behind: Any) -> Any:
            return np.minimum(counts, behind)

        first_flying = np.where(disjoint, 1 if frozen else flying(depth), flying(l_pp) if not frozen else 1)
        inside = np.where(disjoint, 0.0, encodes * kept_v * v_first * positions * first_flying)
        total = (
            static[0] + np.where(disjoint, kept_v * v_first * positions * first_flying, 0.0),
            static[1] + np.where(disjoint, kept_v * v_last * positions * (1 if frozen else flying(l_pp + 1)), 0.0),
            static[2] + kept_l * l_first * tokens * flying(l_pp) + inside,
            static[3] + np.where(l_pp == 1, 0.0, kept_l * l_last * tokens),
        )
        whole = (table.columns[0] != PLACED.index("replicated")) | (shards == 1)
        scale = (1 - ROUNDING) / self._room
        return (
            np.where(whole, np.max(static, axis=0) * scale, 0.0),
            np.where(whole, np.max(total, axis=0) * scale, 0.0),
            np.where(whole, np.max(ranks(2), axis=0), 0.0),
        )
