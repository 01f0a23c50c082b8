"""Assignments: by hand, against brute force on few samples, by property, and against stock groupings."""

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dflop.balance import OBJECTIVES, Assignment, assign
from hf_dflop.errors import BalanceError
from tests.unit.balance.mixtures import heavy_tailed, onevision

Seconds = npt.NDArray[np.float64]


def cost(groups: Any, vision: Seconds, llm: Seconds, objective: str, padded: bool) -> float:
    """The objective, computed the slow way."""
    v = [[sum(vision[i] for i in slot) for slot in rank] for rank in groups]
    lm = [
        [len(slot) * max(llm[i] for i in slot) if padded else sum(llm[i] for i in slot) for slot in rank]
        for rank in groups
    ]
    ranks, slots = range(len(groups)), range(len(groups[0]))
    if objective == "step":
        return max(sum(v[r][s] + lm[r][s] for s in slots) for r in ranks)
    if objective == "slot":
        return sum(max(v[r][s] + lm[r][s] for r in ranks) for s in slots)
    if objective == "stage":
        return sum(max(v[r][s] for r in ranks) + max(lm[r][s] for r in ranks) for s in slots)
    return max(max(v[r][s], lm[r][s]) for r in ranks for s in slots)


def all_groups(n: int, ranks: int, slots: int) -> Iterator[list[list[list[int]]]]:
    for choice in itertools.product(range(ranks * slots), repeat=n):
        if len(set(choice)) == ranks * slots:
            yield [[[i for i in range(n) if choice[i] == r * slots + s] for s in range(slots)] for r in range(ranks)]


def stock(n: int, ranks: int, slots: int, seed: int) -> list[list[npt.NDArray[np.int64]]]:
    """A random order cut into equal microbatches: what a plain sampler gives."""
    order = np.random.default_rng(seed).permutation(n)
    return [list(np.array_split(part, slots)) for part in np.array_split(order, ranks)]


def sorted_runs(llm: Seconds, ranks: int, slots: int) -> list[list[npt.NDArray[np.int64]]]:
    """Runs of the order by length, sizes hill-climbed to equal count × longest, dealt by cost to slots."""
    order = np.argsort(-llm, kind="stable")
    num = ranks * slots
    sizes = [len(part) for part in np.array_split(order, num)]

    def costs() -> list[float]:
        starts = np.cumsum([0, *sizes[:-1]])
        return [size * float(llm[order[start]]) for start, size in zip(starts, sizes, strict=True)]

    best = max(costs())
    for _ in range(20 * num):
        now = costs()
        high, low = int(np.argmax(now)), int(np.argmin(now))
        if sizes[high] == 1:
            break
        sizes[high] -= 1
        sizes[low] += 1
        if max(costs()) > best:
            sizes[high] += 1
            sizes[low] -= 1
            break
        best = max(costs())
    groups = np.split(order, np.cumsum(sizes)[:-1])
    by_cost = sorted(range(num), key=lambda g: -costs()[g])
    return [[groups[by_cost[s * ranks + r]] for s in range(slots)] for r in range(ranks)]


def test_packed_step_by_hand() -> None:
    # ranks 6 + 1 and 4 + 3; vision and LLM seconds add up
    result = assign([6, 0, 3, 0], [0, 4, 0, 1], num_ranks=2, num_slots=2, objective="step", padded=False)
    assert result.predicted_s == 7.0
    assert [[slot.tolist() for slot in rank] for rank in result.groups] in (
        [[[0], [3]], [[1], [2]]],
        [[[1], [2]], [[0], [3]]],
    )
    assert result.rank_busy_s.tolist() == [7.0, 7.0]
    assert (result.imbalance, result.gap) == (0.0, 0.0)


def test_padded_by_hand() -> None:
    # 4 long and 4 short: mixing pads to 4 x 8 per rank = 64 in all; runs cost 4 x 8 and 4 x 1
    llm = [8, 1, 8, 1, 8, 1, 8, 1]
    base = [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    result = assign([0] * 8, llm, num_ranks=2, num_slots=1, objective="step", padded=True, baseline=base)
    # 3 long (24) beside 1 long + 4 short (5 x 8 = 40) is worse than 4 long (32) beside 4 short (4)
    assert result.predicted_s == 32.0
    assert result.baseline_s == 32.0
    assert sorted(result.rank_busy_s) == [4.0, 32.0]
    assert not result.is_baseline  # the same time, less compute
    assert result.imbalance == pytest.approx(1 - 18 / 32)
    assert result.baseline_imbalance == 0.0


def test_slot_by_hand() -> None:
    # slots (5, 5) and (1, 1) take 6; (5, 1) and (1, 5) would take 10
    result = assign([5, 1, 1, 5], [0, 0, 0, 0], num_ranks=2, num_slots=2, objective="slot", padded=False)
    assert result.predicted_s == 6.0
    assert sorted(int(rank[0][0]) for rank in result.groups) == [0, 3]  # the heavy slot comes first


def test_stage_by_hand() -> None:
    # one slot: the slowest encoder (4) and the slowest LLM (4), however the samples are paired
    result = assign([4, 0, 4, 0], [0, 4, 0, 4], num_ranks=2, num_slots=1, objective="stage", padded=False)
    assert result.predicted_s == 8.0
    # two slots: vision beside vision and LLM beside LLM, 4 + 4; mixed slots would take 8 each
    split = assign([4, 0, 4, 0], [0, 4, 0, 4], num_ranks=2, num_slots=2, objective="stage", padded=False)
    assert split.predicted_s == 8.0


def test_pipeline_by_hand() -> None:
    result = assign([4, 0, 4, 0], [0, 4, 0, 4], num_ranks=1, num_slots=2, objective="pipeline", padded=False)
    assert result.predicted_s == 4.0
    assert result.imbalance == 0.0  # both stages are busy in both slots


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_close_to_brute_force(objective: str, padded: bool) -> None:
    rng = np.random.default_rng(11)
    factors = []
    for trial in range(12):
        n, ranks, slots = ((7, 2, 1), (6, 2, 2), (7, 3, 1))[trial % 3]
        vision, llm = rng.integers(0, 9, (2, n)).astype(float)
        result = assign(vision, llm, num_ranks=ranks, num_slots=slots, objective=objective, padded=padded, seed=trial)
        result.validate(n)
        found = cost(result.groups, vision, llm, objective, padded)
        assert found == pytest.approx(result.predicted_s)
        best = min(cost(groups, vision, llm, objective, padded) for groups in all_groups(n, ranks, slots))
        assert result.bound_s <= best * (1 + 1e-12)
        factors.append(found / best)
    assert min(factors) >= 1 - 1e-12
    assert max(factors) <= 1.1
    assert np.mean(factors) <= 1.01


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    ranks, slots = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    n = data.draw(st.integers(ranks * slots, ranks * slots + 20))
    objective, padded = data.draw(st.sampled_from(list(OBJECTIVES))), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    llm = rng.choice([0.0, 0.1, 1.0, 7.0], n) * rng.random(n)
    vision = rng.choice([0.0, 0.5, 3.0], n) * rng.random(n)
    tokens = np.rint(llm * 100).astype(int) + 1
    patches = rng.integers(0, 50, n)
    base = stock(n, ranks, slots, 1)
    used = [(len(g) * tokens[g].max() if padded else tokens[g].sum(), patches[g].sum()) for rank in base for g in rank]
    max_tokens, max_patches = (int(x) for x in np.max(used, axis=0))  # as tight as the baseline allows
    arguments: dict[str, Any] = {
        "num_ranks": ranks,
        "num_slots": slots,
        "objective": objective,
        "padded": padded,
        "baseline": base,
        "tokens": tokens,
        "max_tokens": max_tokens,
        "patches": patches,
        "max_patches": max_patches,
        "seed": data.draw(st.integers(0, 1000)),
        "proposals": 500,
    }
    result = assign(vision, llm, **arguments)
    result.validate(n)
    assert (len(result.groups), {len(rank) for rank in result.groups}) == (ranks, {slots})
    for rank in result.groups:
        for group in rank:
            assert (len(group) * tokens[group].max() if padded else tokens[group].sum()) <= max_tokens
            assert patches[group].sum() <= max_patches
    now, before = (cost(groups, vision, llm, objective, padded) for groups in (result.groups, base))
    assert now <= before * (1 + 1e-9)
    assert (result.predicted_s, result.baseline_s) == (pytest.approx(now, abs=1e-9), pytest.approx(before, abs=1e-9))
    assert result.bound_s <= result.predicted_s * (1 + 1e-12)
    assert -1e-12 <= result.imbalance <= 1
    again = assign(vision, llm, **arguments)
    for one, other in zip(result.groups, again.groups, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_baseline_that_wins_is_returned_as_it_is() -> None:
    base = [[[3, 0]], [[2, 1]]]  # 4 + 1 and 2 + 3: nothing is better
    result = assign([0] * 4, [4, 3, 2, 1], num_ranks=2, num_slots=1, objective="step", padded=False, baseline=base)
    assert result.is_baseline
    assert [[slot.tolist() for slot in rank] for rank in result.groups] == base
    assert (result.speedup, result.imbalance, result.baseline_imbalance) == (1.0, 0.0, 0.0)


def test_baseline_above_a_cap_is_not_kept() -> None:
    base = [[[0, 1]], [[2, 3]]]
    result = assign(
        [0] * 4, [2, 2, 2, 2], num_ranks=2, num_slots=1, objective="step", padded=False, baseline=base,
        tokens=[5, 5, 1, 1], max_tokens=6,
    )  # fmt: skip
    assert not result.is_baseline
    assert {tuple(sorted(rank[0].tolist())) for rank in result.groups} in ({(0, 2), (1, 3)}, {(0, 3), (1, 2)})


def test_tight_caps_are_met() -> None:
    # bins of exactly 10: only {6, 4}, {7, 3}, {8, 2}, {5, 5} fit
    tokens = np.array([6, 4, 7, 3, 8, 2, 5, 5])
    result = assign(
        np.zeros(8), tokens.astype(float) ** 2, num_ranks=2, num_slots=2, objective="slot", padded=False,
        tokens=tokens, max_tokens=10,
    )  # fmt: skip
    assert [tokens[g].sum() for rank in result.groups for g in rank] == [10] * 4


def test_heavy_first() -> None:
    vision, llm, _, _ = onevision(64, 0)
    for objective in ("step", "slot", "stage"):
        result = assign(vision, llm, num_ranks=4, num_slots=4, objective=objective, padded=True)
        if objective == "step":
            for rank in result.groups:
                busy = [vision[g].sum() + len(g) * llm[g].max() for g in rank]
                assert busy == sorted(busy, reverse=True)
        else:
            slots = [cost([[rank[s]] for rank in result.groups], vision, llm, objective, True) for s in range(4)]
            assert slots == sorted(slots, reverse=True)


def test_packed_step_evens_the_slots_of_a_rank() -> None:
    vision, llm, tokens, patches = onevision(128, 2)
    result = assign(
        vision, llm, num_ranks=4, num_slots=4, objective="step", padded=False, tokens=tokens, patches=patches
    )
    for rank in result.groups:
        per_slot = np.array([tokens[g].sum() for g in rank])
        assert per_slot.max() <= 1.25 * per_slot.mean()


@pytest.mark.parametrize("mixture", [heavy_tailed, onevision])
@pytest.mark.parametrize(("n", "ranks", "slots"), [(30, 2, 3), (64, 8, 2), (128, 8, 4)])
def test_padded_beats_sorted_runs_and_random(mixture: Any, n: int, ranks: int, slots: int) -> None:
    for ratio in (0.0, 1.0):
        for objective in ("step", "slot", "stage"):
            over_runs, over_random = [], []
            for seed in range(5):
                vision, llm, _, _ = mixture(n, seed, ratio)
                base = stock(n, ranks, slots, seed)
                result = assign(
                    vision, llm, num_ranks=ranks, num_slots=slots, objective=objective, padded=True, baseline=base
                )
                runs = cost(sorted_runs(llm, ranks, slots), vision, llm, objective, True)
                over_runs.append(result.predicted_s / runs)
                over_random.append(result.predicted_s / result.baseline_s)
            assert np.mean(over_runs) <= 0.97
            assert np.mean(over_random) <= 0.75


def test_packed_is_close_to_the_bound() -> None:
    for objective, limit in (("step", 1.005), ("slot", 1.005), ("stage", 1.02)):
        gaps = []
        for seed in range(5):
            vision, llm, _, _ = onevision(256, seed)
            result = assign(vision, llm, num_ranks=8, num_slots=4, objective=objective, padded=False)
            gaps.append(1 + result.gap)
        assert np.mean(gaps) <= limit


def test_zero_costs() -> None:
    for objective in OBJECTIVES:
        for padded in (False, True):
            result = assign([0] * 9, [0] * 9, num_ranks=2, num_slots=3, objective=objective, padded=padded)
            result.validate(9)
            assert (result.predicted_s, result.imbalance, result.gap, result.speedup) == (0.0, 0.0, 0.0, 1.0)
            assert math.isnan(result.baseline_s)


def test_one_sample_each() -> None:
    result = assign([1, 2, 3, 4], [0] * 4, num_ranks=2, num_slots=2, objective="slot", padded=True)
    assert result.predicted_s == 6.0  # (4, 3) and (2, 1)
    single = assign([1, 2], [3, 4], num_ranks=1, num_slots=1, objective="stage", padded=True)
    assert single.predicted_s == 3 + 8


def test_place() -> None:
    result = assign([5, 1, 1, 5], [0] * 4, num_ranks=2, num_slots=2, objective="slot", padded=False)
    for sample, (rank, slot) in enumerate(result.place()):
        assert sample in result.groups[rank][slot]


ROOT = Path(__file__).parents[3]
PINNED = "2132210031021223"


def pinned() -> str:
    """rank·2 + slot of each sample for whole-number inputs: the same on every platform."""
    numbers = np.array([(i * i * 7919) % 101 for i in range(1, 33)])
    result = assign(numbers[:16], numbers[16:], num_ranks=2, num_slots=2, objective="stage", padded=True, seed=4)
    return "".join(str(2 * rank + slot) for rank, slot in result.place())


def test_same_in_a_fresh_process_and_everywhere() -> None:
    code = "from tests.unit.balance.test_assign import pinned; print(pinned())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == pinned() == PINNED


def test_validate_finds_broken_assignments() -> None:
    def broken(*groups: Any) -> Assignment:
        return Assignment(
            groups=tuple(tuple(np.array(slot, dtype=np.int64) for slot in rank) for rank in groups),
            objective="step", predicted_s=1.0, baseline_s=1.0, bound_s=1.0, rank_busy_s=np.ones(2),
            imbalance=0.0, baseline_imbalance=0.0,
        )  # fmt: skip

    with pytest.raises(BalanceError, match="sample 1 0 times"):
        broken([[0]], [[2]]).validate(3)
    with pytest.raises(BalanceError, match="sample 0 2 times"):
        broken([[0]], [[0]]).validate(2)
    with pytest.raises(BalanceError, match="no sample in microbatch 0 of rank 1"):
        broken([[0]], [[]]).validate(1)
    with pytest.raises(BalanceError, match=r"\[1, 2\] microbatches"):
        broken([[0]], [[1], [2]]).validate(3)
    with pytest.raises(BalanceError, match="holds sample 7; positions are 0 to 1"):
        broken([[0]], [[7]]).validate(2)


BASE: dict[str, Any] = {
    "vision_s": [1.0, 1.0, 1.0, 1.0],
    "llm_s": [1.0, 2.0, 3.0, 4.0],
    "num_ranks": 2,
    "num_slots": 1,
    "objective": "step",
    "padded": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slots": 3}, "4 samples cannot fill 2 ranks x 3 microbatches = 6"),
        ({"num_ranks": 0}, "num_ranks=0"),
        ({"vision_s": [1.0, float("nan"), 1.0, 1.0]}, "vision_s is nan at position 1"),
        ({"llm_s": [1.0, 1.0, 1.0, -1.0]}, "llm_s is -1.0 at position 3"),
        ({"llm_s": [1.0]}, r"llm_s \(1,\)"),
        ({"tokens": [1, 2, 3], "max_tokens": 9}, "there are 4 samples"),
        ({"max_patches": 9}, "max_patches=9 was given without patches"),
        ({"tokens": [1, 2, 30, 1], "max_tokens": 9}, "sample 2 has 30 tokens, above max_tokens=9"),
        ({"patches": [4, 4, 4, 4], "max_patches": 7}, "16 in all .*2 microbatches x 7 = 14"),
        ({"tokens": [4, 4, 4, 4], "max_tokens": 7, "padded": True}, "number of samples x longest"),
        ({"baseline": [[[0, 1, 2, 3]]]}, "expected num_ranks=2 times num_slots=1"),
        ({"baseline": [[[0, 1]], [[2]]]}, "holds sample 3 0 times"),
        ({"baseline": [[[0, 1, 2, 3]], [[]]]}, "no sample in microbatch 0 of rank 1"),
        ({"baseline": [[[0.5, 1, 2]], [[3]]]}, "arrays of sample positions"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BalanceError, match=message):
        assign(**{**BASE, **change})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sample_above_a_cap_runs_alone(objective: str, padded: bool) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 10, 24)
    tokens[[3, 17]] = [90, 41]
    patches = np.where(np.arange(24) % 3 == 0, 8, 0)
    patches[8] = 70
    result = assign(
        patches / 10, tokens, num_ranks=2, num_slots=4, objective=objective, padded=padded, tokens=tokens,
        max_tokens=100 if padded else 40, patches=patches, max_patches=32, oversize="alone",
        baseline=[np.split(np.arange(0, 12), 4), np.split(np.arange(12, 24), 4)],
    )  # fmt: skip
    result.validate(24)
    alone = {int(group[0]) for rank in result.groups for group in rank if len(group) == 1}
    assert {8} | (set() if padded else {3, 17}) <= alone
    for rank in result.groups:
        for group in rank:
            if len(group) > 1:
                used = len(group) * tokens[group].max() if padded else tokens[group].sum()
                assert used <= (100 if padded else 40)
                assert patches[group].sum() <= 32


def test_oversize_is_an_error_unless_asked_for() -> None:
    limited = {**BASE, "tokens": [1, 2, 30, 1], "max_tokens": 9}
    with pytest.raises(BalanceError, match=r'sample 2 has 30 tokens, above max_tokens=9 .*oversize="alone"'):
        assign(**limited)
    assert [2] in [slot.tolist() for rank in assign(**limited, oversize="alone").groups for slot in rank]
    with pytest.raises(BalanceError, match="no assignment"):  # three alone, and two microbatches
        assign(**{**limited, "tokens": [30, 30, 30, 1]}, oversize="alone")
    with pytest.raises(ValueError, match="'drop'; choose one of 'error', 'alone'"):
        assign(**limited, oversize="drop")


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="'fsdp'; choose one of 'step', 'slot', 'stage', 'pipeline'"):
        assign(**{**BASE, "objective": "fsdp"})


def test_import_is_light() -> None:
    code = "import sys, hf_dflop.balance; print([m for m in ('torch', 'numba', 'ortools') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def slowed(vision: Seconds, llm: Seconds, slowness: list[float], ranks: int, slots: int, **kwargs: Any) -> Assignment:
    return assign(
        vision, llm, num_ranks=ranks, num_slots=slots, rank_speeds=[1 / s for s in slowness], padded=False, **kwargs
    )


def test_a_slow_rank_gets_less_work_by_hand() -> None:
    # 4 and 2 samples of 1 s: rank 1 takes twice as long for each, so both end after 4 s
    result = slowed(np.zeros(6), np.ones(6), [1.0, 2.0], 2, 1, objective="step")
    assert [len(rank[0]) for rank in result.groups] == [4, 2]
    assert (result.predicted_s, result.bound_s, result.imbalance) == (4.0, 4.0, 0.0)
    assert result.rank_busy_s.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_speeds_against_brute_force(objective: str, padded: bool) -> None:
    rng = np.random.default_rng(5)
    factors = []
    for trial in range(9):
        n, ranks, slots = ((7, 2, 1), (6, 2, 2), (7, 3, 1))[trial % 3]
        vision, llm = rng.integers(0, 9, (2, n)).astype(float)
        slowness = rng.choice([1.0, 1.25, 1.5, 2.0], ranks)
        slowness[trial % ranks] = 1.0

        def slow_cost(groups: Any, slowness: Seconds = slowness, v: Seconds = vision, lm: Seconds = llm) -> float:
            table = np.array(
                [
                    [
                        (s * v[list(g)].sum(), s * (len(g) * lm[list(g)].max() if padded else lm[list(g)].sum()))
                        for g in rank
                    ]
                    for rank, s in zip(groups, slowness, strict=True)
                ]
            )
            return float(OBJECTIVES[objective](table[..., 0], table[..., 1]))

        result = assign(
            vision, llm, num_ranks=ranks, num_slots=slots, objective=objective, padded=padded, seed=trial,
            rank_speeds=1 / slowness,
        )  # fmt: skip
        result.validate(n)
        assert result.predicted_s == pytest.approx(slow_cost(result.groups))
        best = min(slow_cost(groups) for groups in all_groups(n, ranks, slots))
        assert result.bound_s <= best * (1 + 1e-9)
        factors.append(result.predicted_s / best)
    assert min(factors) >= 1 - 1e-9
    assert max(factors) <= 1.15
    assert np.mean(factors) <= 1.02


def test_many_ranks_of_different_speed_end_together() -> None:
    vision, llm, _, _ = onevision(256, 3)
    slowness = [1.3 if rank == 5 else 1.0 for rank in range(8)]
    for objective in ("step", "slot"):
        blind = assign(vision, llm, num_ranks=8, num_slots=4, objective="step", padded=False)
        seeing = slowed(vision, llm, slowness, 8, 4, objective=objective)
        waits = 1 - (blind.rank_busy_s * slowness).mean() / (blind.rank_busy_s * slowness).max()
        assert waits > 0.15
        assert seeing.imbalance < 0.05, (objective, seeing.imbalance)


@pytest.mark.parametrize(("speeds", "message"), [([1.0], "shape"), ([1.0, 0.0], "rank|speed"), ([1.0, 0.1], "slower")])
def test_speeds_that_are_not_usable(speeds: list[float], message: str) -> None:
    with pytest.raises(BalanceError, match=message):
        assign([1, 1], [1, 1], num_ranks=2, num_slots=1, objective="step", padded=False, rank_speeds=speeds)
