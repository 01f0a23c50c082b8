"""The online fit: right from wrong costs, robust, harmless where nothing can be learned, the same on every rank."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hf_dflop.cost import CostModel, ModelSpec, OnlineFit, Refinement, refine
from hf_dflop.cost.fit import nnls
from hf_dflop.cost.model import Rates
from hf_dflop.cost.slowness import RankSpeeds, watch
from hf_dflop.cost.small_solve import nonnegative_least_squares, sines
from hf_dflop.errors import ModelError

SUB = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SPEC = ModelSpec.from_config(
    {
        "vision_config": SUB | {"patch_size": 14},
        "text_config": SUB | {"hidden_act": "silu", "vocab_size": 32},
        "projector_hidden_act": "gelu",
    }
)
BASE = CostModel.analytic(SPEC)
TRUE = CostModel(
    spec=SPEC,
    rates=Rates(vision_linear=2e9, vision_attention=1.5e9, llm_linear=4e9, llm_attention=3e9),
    per_microbatch_s=0.02,
)


def microbatches(count: int, seed: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 0.7, (count, 2)) * 1e8
    return np.column_stack([size[:, 0], size[:, 0] * 0.3, size[:, 1], (size[:, 1] / 1e8) ** 2 * 4e7])


def seconds(model: CostModel, flops: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rates = [
        model.rates.vision_linear,
        model.rates.vision_attention,
        model.rates.llm_linear,
        model.rates.llm_attention,
    ]
    return (flops / rates).sum(axis=1) + model.per_microbatch_s


def run(updates: int, measure: Any, num_ranks: int = 4, fit: OnlineFit | None = None) -> tuple[OnlineFit, Refinement]:
    fit = fit or OnlineFit.start(BASE, num_ranks)
    current = BASE
    for number in range(updates):
        flops = microbatches(10 * num_ranks * 2, number)
        rank = np.tile(np.arange(num_ranks), 20)
        fit, found = refine(fit, BASE, current, flops, measure(flops, rank, number), rank, steps=10)
        current = found.model
    return fit, found


def off(model: CostModel) -> float:
    """Mean relative error of predictions, up to scale."""
    flops = microbatches(200, 99)
    ratio = seconds(model, flops) / seconds(TRUE, flops)
    return float(np.mean(np.abs(ratio / np.median(ratio) - 1)))


def noisy(flops: Any, rank: Any, number: int) -> Any:
    rng = np.random.default_rng(1000 + number)
    spikes = np.where(rng.random(len(flops)) < 0.05, 4.0, 1.0)
    return seconds(TRUE, flops) * rng.lognormal(0, 0.05, len(flops)) * spikes


def test_wrong_rates_are_found_in_spite_of_noise_and_spikes() -> None:
    assert off(BASE) > 0.08
    _, first = run(1, noisy)
    assert first.changed
    assert first.error_before > first.error
    assert off(first.model) < 0.03
    fit, found = run(6, noisy)
    assert off(found.model) < 0.01
    assert found.undetermined in ((), ("vision_attention",), ("vision_linear", "vision_attention"))
    assert fit.speeds.slow_ranks == ()


def test_without_noise_it_settles() -> None:
    _, found = run(4, lambda flops, rank, number: seconds(TRUE, flops))
    assert off(found.model) < 1e-2
    assert not found.changed


def test_microbatches_all_alike_change_nothing_but_the_scale() -> None:
    one = microbatches(1, 3)
    fit, found = refine(
        OnlineFit.start(BASE, 2), BASE, BASE, np.repeat(one, 40, axis=0), np.full(40, 7.0), np.arange(40) % 2, steps=10
    )
    assert set(found.undetermined) == {"vision_linear", "vision_attention", "llm_linear", "llm_attention"}
    ratios = np.array(fit.factors[1:])
    assert ratios.max() / ratios.min() < 1.01
    assert seconds(found.model, one)[0] == pytest.approx(7.0, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 0.0])
def test_times_that_are_not_times_are_left_out(bad: float) -> None:
    def broken(flops: Any, rank: Any, number: int) -> Any:
        values = noisy(flops, rank, number)
        values[rank == 1] = bad  # one rank without timings
        values[::7] = bad
        return values

    fit, found = run(4, broken)
    assert found.num_unusable > 20
    assert off(found.model) < 0.02
    assert fit.speeds.slowness[1] == 1.0
    nothing, empty = run(1, lambda flops, rank, number: np.full(len(flops), bad))
    assert nothing == OnlineFit.start(BASE, 4)
    assert (empty.model, empty.changed, empty.num_used) == (BASE, False, 0)


def test_a_slow_rank_is_found_and_does_not_bend_the_rates() -> None:
    def slowed(flops: Any, rank: Any, number: int) -> Any:
        return noisy(flops, rank, number) * np.where(rank == 2, 1.3, 1.0)

    fit, _ = run(1, slowed)
    assert fit.speeds.slow_ranks == ()  # once is not enough
    assert fit.speeds.speeds is None
    fit, found = run(4, slowed)
    assert fit.speeds.slow_ranks == (2,)
    assert fit.speeds.slowness[2] == pytest.approx(1.3, abs=0.03)
    assert off(found.model) < 0.02
    assert fit.speeds.speeds is not None
    assert fit.speeds.speeds[2] == pytest.approx(1 / 1.3, abs=0.03)
    recovered, _ = run(10, noisy, fit=fit)
    assert recovered.speeds.slow_ranks == ()


def test_two_ranks_one_slow() -> None:
    fit, _ = run(3, lambda flops, rank, number: noisy(flops, rank, number) * np.where(rank == 0, 1.3, 1.0), 2)
    assert fit.speeds.slow_ranks == (0,)
    assert fit.speeds.slowness[1] == pytest.approx(1.0, abs=0.01)


def test_it_follows_a_change_of_speed() -> None:
    fit, _ = run(6, noisy)
    slower = CostModel(spec=SPEC, rates=Rates(vision_linear=1e9, vision_attention=7.5e8, llm_linear=4e9,
                                              llm_attention=3e9), per_microbatch_s=0.02)  # fmt: skip
    _, after = run(20, lambda flops, rank, number: seconds(slower, flops), fit=fit)
    flops = microbatches(200, 98)
    ratio = seconds(after.model, flops) / seconds(slower, flops)
    assert float(np.mean(np.abs(ratio / np.median(ratio) - 1))) < 0.03


def test_the_state_survives_a_checkpoint_to_the_bit() -> None:
    fit, _ = run(3, noisy)
    again = OnlineFit.from_dict(json.loads(json.dumps(fit.to_dict())))
    assert again == fit
    assert run(2, noisy, fit=again) == run(2, noisy, fit=fit)
    with pytest.raises(ModelError, match="not readable"):
        OnlineFit.from_dict({"base": "x"})


def test_fewer_updates_in_a_row_than_two_call_no_rank_slow() -> None:
    speeds = RankSpeeds.even(3)
    rank = np.repeat(np.arange(3), 8)
    once = watch(speeds, rank, np.where(rank == 1, 1.5, 1.0), 10)
    assert once.num_seen == (0, 1, 0)
    assert watch(once, rank, np.ones(24), 10).num_seen == (0, 0, 0)
    assert watch(once, rank, np.where(rank == 1, 1.5, 1.0), 10).slow_ranks == (1,)
    assert watch(speeds, rank[:8], np.ones(8), 10) == speeds  # one rank alone cannot be compared


def test_the_small_solver_agrees_with_the_general_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        columns = rng.normal(size=(12, 5))
        target = rng.normal(size=12) + columns[:, 0]
        found = nonnegative_least_squares((columns.T @ columns).tolist(), (columns.T @ target).tolist())
        assert found == pytest.approx(nnls(columns, target).tolist(), abs=1e-9)
    by_hand = sines([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert by_hand == pytest.approx([0.8, 0.8, 0.0])
