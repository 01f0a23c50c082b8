"""Rows under dense attention cost what one sample of all their tokens would; dummies count like samples."""

from typing import Any

import numpy as np

from hf_dflop.balance import assign
from hf_dflop.data.dummies import Dummy, with_dummies, without_dummies
from hf_dflop.data.joined_rows import priced_by_row, sample_costs
from hf_dflop.data.step_plan import Caps
from tests.unit.data.samplers import COST, build, shapes_of


class Square:
    """f(T) = T²."""

    def llm_s(self, tokens: Any) -> Any:
        return np.asarray(tokens, dtype=float) ** 2


def test_a_token_costs_what_it_adds_to_a_mean_row() -> None:
    tokens = np.array([10, 20, 30, 40])
    assert np.allclose(sample_costs(Square(), tokens, 2), 2 * 50 * tokens)  # type: ignore[arg-type]


def test_rows_are_priced_whole() -> None:
    tokens, zero = np.array([6, 4, 1, 1]), np.zeros(4)
    stock = [[[0, 1]], [[2, 3]]]
    cost: Any = Square()
    found = assign(
        zero, sample_costs(cost, tokens, 2), num_ranks=2, num_slots=1, objective="step", padded=False, baseline=stock
    )
    priced = priced_by_row(found, cost, zero, tokens, stock, may_keep=True)
    assert (priced.predicted_s, priced.baseline_s, priced.bound_s) == (36.0, 100.0, 36.0)
    assert priced.imbalance == 0.0
    assert priced.baseline_imbalance == 1 - 104 / 200
    kept = priced_by_row(found, cost, zero, tokens, [[[0]], [[1, 2, 3]]], may_keep=True)
    assert kept.is_baseline
    assert [[slot.tolist() for slot in rank] for rank in kept.groups] == [[[0]], [[1, 2, 3]]]


def test_the_sampler_balances_whole_rows() -> None:
    shapes = shapes_of(96, seed=3)
    one = build(shapes, 4, 1, 6, all_pairs=True, objective="slot")
    list(one)
    for step in range(4):
        plan = one.plan_of(0, step)
        rows = [int(shapes.llm_tokens[plan.microbatches(rank)[0]].sum()) for rank in range(4)]
        vision = [float(COST.vision_s(shapes.select(plan.microbatches(rank)[0])).sum()) for rank in range(4)]
        seconds = np.asarray(vision) + COST.llm_s(rows)
        assert np.isclose(plan.assignment.predicted_s, seconds.max())
        assert plan.assignment.predicted_s <= plan.assignment.baseline_s * (1 + 1e-12)
        assert np.isclose(one.microbatch_s(plan.microbatches(0)[0]), seconds[0])


def arguments(has_image: list[bool], baseline: Any, **change: Any) -> dict[str, Any]:
    n = len(has_image)
    base = {
        "vision_s": np.zeros(n), "llm_s": np.ones(n), "num_ranks": len(baseline), "num_slots": len(baseline[0]),
        "objective": "step", "padded": False, "baseline": baseline, "tokens": np.ones(n, dtype=int), "max_tokens": 99,
        "patches": np.zeros(n, dtype=int), "max_patches": 99, "spread": np.array(has_image),
    }  # fmt: skip
    return base | change


DUMMY = Dummy(vision_s=0.25, llm_s=0.5, tokens=3, patches=4)


def test_bare_stock_microbatches_get_a_dummy() -> None:
    given = arguments([True, False, False, False], [[[0, 1]], [[2, 3]]])
    filled = with_dummies(given, DUMMY)
    assert filled is not None
    assert filled["baseline"] == [[[0, 1]], [[2, 3, 4]]]
    assert filled["tokens"].tolist() == [1, 1, 1, 1, 3]
    assert filled["patches"].tolist() == [0, 0, 0, 0, 4]
    found = without_dummies(assign(**filled), 4)
    assert found is not None
    found.validate(4)
    assert found.predicted_s == 2.75  # the rank without an image: 2 samples and the dummy
    assert with_dummies(arguments([True, False, True, False], [[[0, 1]], [[2, 3]]]), DUMMY) is None


def test_a_microbatch_of_dummies_alone_is_none() -> None:
    given = arguments([False, False, False], [[[0, 1]], [[2]]], llm_s=np.array([1.0, 1.0, 9.0]))
    filled = with_dummies(given, Dummy(vision_s=0, llm_s=2.0, tokens=1, patches=1))
    assert filled is not None
    alone = assign(**{**filled, "baseline": None})
    assert without_dummies(alone, 3) is None or all(len(g) for rank in alone.groups for g in rank)


def test_the_dummy_row_is_held_back_from_the_cap() -> None:
    shapes = shapes_of(64, seed=2)
    bare = np.flatnonzero(shapes.num_images)[4:]
    for name in ("num_images", "image_tiles", "image_patches", "image_patches_sq", "image_tokens"):
        getattr(shapes, name)[bare] = 0
    cap = int(shapes.llm_tokens.max()) + 400
    for padded in (False, True):
        for rank in range(2):
            sampler = build(
                shapes, 2, 2, 4, rank, caps=Caps(max_tokens=cap * (4 if padded else 1)), padded=padded,
                spread_images=True, fill_images=True, dummy=Dummy(vision_s=1e-9, llm_s=1e-9, tokens=100, patches=4),
            )  # fmt: skip
            for group in sampler:
                tokens = shapes.llm_tokens[group].tolist()
                if not shapes.num_images[group].any():
                    tokens.append(100)
                used = len(tokens) * max(tokens) if padded else sum(tokens)
                assert used <= cap * (4 if padded else 1)
