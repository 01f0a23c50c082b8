"""Samplers of others that Trainer does not have, written from their published descriptions.

In: the stock deal of an epoch (rank → its microbatches), shapes and LLM seconds by dataset index. Out: another deal
with the same number of microbatches on every rank, in which every sample of the epoch comes once.

    llm_lpt         longest processing time first on the LLM's cost alone, within each optimizer step
    omnibal         OmniBal (arXiv 2407.20761), iterative sampling and filtering over the whole epoch
    visual_sorted   NeMo Automodel's VLM packing as its documentation has it: packs by tokens alone, biggest sample
                    first, then dealt in the order of their visual tokens, so that ranks run packs of like vision work
                    together

Assumptions: the published forms of the last two choose a token budget and take as many packs as come out. Here the
budget is the smallest for which the packs are no more than the stock microbatches (so that the optimizer makes as many
steps over the same samples), which is the tightest and so the most favourable one; where fewer packs come out, the
largest are divided.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SAMPLERS", "Deal", "SamplerInput"]

Deal = list[list[list[int]]]
"""rank → microbatch → dataset indices."""
Pack = list[int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplerInput:
    """What a sampler may look at."""

    stock: Deal
    num_slots: int
    """Microbatches of a rank in an optimizer step."""
    tokens: npt.NDArray[np.int64]
    """LLM tokens of each sample of the dataset."""
    patches: npt.NDArray[np.int64]
    """Encoder patches of each sample."""
    llm_s: npt.NDArray[np.float64]
    """Seconds of each sample in the LLM."""
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.stock)

    @property
    def num_packs(self) -> int:
        """Microbatches of all ranks in the epoch."""
        return sum(len(slots) for slots in self.stock)

    @property
    def samples(self) -> list[int]:
        """Dataset indices of the epoch."""
        return [index for slots in self.stock for group in slots for index in group]


def llm_lpt(given: SamplerInput) -> Deal:
    """Each step's samples, most expensive first, into the microbatch with the least LLM seconds so far."""
    ranks: Deal = [[] for _ in given.stock]
    for begin in range(0, len(given.stock[0]), given.num_slots):
        groups = [group for slots in given.stock for group in slots[begin : begin + given.num_slots]]
        samples = np.array([index for group in groups for index in group])
        packs: list[Pack] = [[] for _ in groups]
        loads = np.zeros(len(groups))
        for index in samples[np.argsort(-given.llm_s[samples], kind="stable")].tolist():
            at = int(loads.argmin())
            packs[at].append(index)
            loads[at] += given.llm_s[index]
        # The packs themselves go to the rank with the least so far, largest first, as many to each.
        dealt: Deal = [[] for _ in ranks]
        least = [(0.0, rank) for rank in range(len(ranks))]
        for at in np.argsort(-loads, kind="stable").tolist():
            total, rank = heapq.heappop(least)
            dealt[rank].append(packs[at])
            if len(dealt[rank]) < len(given.stock[rank][begin : begin + given.num_slots]):
                heapq.heappush(least, (total + float(loads[at]), rank))
        for rank, slots in enumerate(dealt):
            ranks[rank] += slots
    return ranks


def omnibal(given: SamplerInput, *, iterations: int = 10, keep: float = 0.9) -> Deal:
    """Groups within a vision and a token budget, drawn at random; full ones are kept, the rest is drawn again.

    Args:
        given ([`SamplerInput`]): the epoch.
        iterations (`int`): rounds of sampling and filtering; what is left after them forms groups as it comes.
        keep (`float`): a group is full when it reaches this share of one of the two budgets.
    """

    def packs_at(scale: float) -> list[Pack]:
        samples = np.array(given.samples)
        weights = np.stack([given.patches[samples], given.tokens[samples]]).astype(np.float64)
        # Budgets in proportion to the means, and room for the largest sample.
        budget = np.maximum(scale * weights.sum(axis=1) / given.num_packs, weights.max(axis=1))
        budget = np.maximum(budget, 1.0)
        rng = np.random.default_rng(given.seed)
        left = np.arange(samples.size)
        kept: list[Pack] = []
        for turn in range(iterations):
            groups = _within(rng.permutation(left), weights, budget)
            again: list[int] = []
            for group in groups:
                full = (weights[:, group].sum(axis=1) >= keep * budget).any()
                if full or turn == iterations - 1:
                    kept.append(samples[group].tolist())
                else:
                    again += group
            left = np.array(again, dtype=np.int64)
            if not left.size:
                break
        return kept

    packs = _fit(packs_at, given.num_packs)
    packs = _divided(packs, given)
    order = np.random.default_rng(given.seed + 1).permutation(len(packs))
    return _dealt([packs[at] for at in order], given)


def visual_sorted(given: SamplerInput) -> Deal:
    """Packs by tokens alone (first fit decreasing), dealt round the ranks in the order of their visual tokens."""
    samples = np.array(given.samples)
    tokens = given.tokens[samples]
    order = np.argsort(-tokens, kind="stable")

    def packs_at(scale: float) -> list[Pack]:
        budget = max(scale * tokens.sum() / given.num_packs, float(tokens.max()))
        room = np.full(samples.size, budget)  # of every pack, also of those not opened yet
        packs: list[Pack] = []
        for at in order.tolist():
            fits = int((room[: len(packs) + 1] >= tokens[at]).argmax())
            if fits == len(packs):
                packs.append([])
            room[fits] -= tokens[at]
            packs[fits].append(int(samples[at]))
        return packs

    packs = _divided(_fit(packs_at, given.num_packs), given)
    packs.sort(key=lambda pack: -int(given.patches[pack].sum()))
    return _dealt(packs, given)


def _within(
    order: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], budget: npt.NDArray[np.float64]
) -> list[list[int]]:
    """Positions in the given order, a new group whenever the next one would exceed one of the two budgets."""
    groups: list[list[int]] = []
    first, second = 0.0, 0.0
    most_first, most_second = budget.tolist()
    for position, (one, other) in zip(order.tolist(), weights[:, order].T.tolist(), strict=True):
        if not groups or first + one > most_first or second + other > most_second:
            groups.append([])
            first = second = 0.0
        groups[-1].append(position)
        first += one
        second += other
    return groups


def _fit(packs_at: Callable[[float], list[Pack]], limit: int) -> list[Pack]:
    """The packs at the smallest budget, to 1 %, that gives at most `limit` of them."""
    low, high = 0.5, 1.0
    while len(packs_at(high)) > limit:
        low, high = high, 2 * high
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        if len(packs_at(middle)) > limit:
            low = middle
        else:
            high = middle
    return packs_at(high)


def _divided(packs: list[Pack], given: SamplerInput) -> list[Pack]:
    """As many packs as microbatches: those with the most tokens that have two samples are halved."""
    if len(packs) == given.num_packs:
        return packs
    done = [pack for pack in packs if len(pack) == 1]
    largest = [(-int(given.tokens[pack].sum()), pack) for pack in packs if len(pack) > 1]
    heapq.heapify(largest)
    while len(done) + len(largest) < given.num_packs:
        _, pack = heapq.heappop(largest)
        by_size = sorted(pack, key=lambda index: -int(given.tokens[index]))
        for half in (by_size[::2], by_size[1::2]):
            if len(half) > 1:
                heapq.heappush(largest, (-int(given.tokens[half].sum()), half))
            else:
                done.append(half)
    return [*(pack for _, pack in sorted(largest)), *done]


def _dealt(packs: list[Pack], given: SamplerInput) -> Deal:
    """Packs one after another round the ranks."""
    return [packs[rank :: given.num_ranks] for rank in range(given.num_ranks)]


SAMPLERS: dict[str, Callable[[SamplerInput], Deal]] = {
    "llm_lpt": llm_lpt,
    "omnibal": omnibal,
    "visual_sorted": visual_sorted,
}
"""Samplers by name."""
