"""Curves: fitted to points made by a known law, never falling, honest beyond what was measured."""

import numpy as np
import pytest

from hf_dflop.cost.curves import Curve, fit_curves
from hf_dflop.errors import ModelError


def _law(tokens: np.ndarray, pairs: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Launch overhead, weights that are slow below 256 tokens, attention that grows with length; a fixed part."""
    layer = 1e-4 + 1e-6 * tokens + 2e-6 * np.minimum(tokens, 256) + 3e-9 * pairs
    return 5e-4 + 4e-6 * tokens + depth * layer


def _points(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.exp(rng.uniform(np.log(64), np.log(4096), count))
    length = np.exp(rng.uniform(np.log(64), np.log(tokens)))
    return tokens, tokens * length


def _grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.geomspace(64, 4096, 7)
    sizes = np.concatenate([tokens, tokens])
    pairs = np.concatenate([tokens**2, tokens * 128])
    return np.tile(sizes, 2), np.tile(pairs, 2), np.repeat([1.0, 3.0], sizes.size)


def test_two_depths_give_layer_and_fixed_part() -> None:
    tokens, pairs, depth = _grid()
    layer, fixed = fit_curves(tokens, pairs, depth, _law(tokens, pairs, depth))
    tokens, pairs = _points(np.random.default_rng(0), 200)
    for layers in (2, 28):
        predicted = fixed.at(tokens, pairs) + layers * layer.at(tokens, pairs)
        error = np.abs(predicted / _law(tokens, pairs, np.full(200, layers)) - 1)
        assert np.median(error) < 0.01
        assert error.max() < 0.06


def test_noise_of_the_points_is_not_followed() -> None:
    tokens, pairs, depth = _grid()
    noise = 1 + 0.03 * np.random.default_rng(1).standard_normal(tokens.size)
    layer, fixed = fit_curves(tokens, pairs, depth, _law(tokens, pairs, depth) * noise)
    tokens, pairs = _points(np.random.default_rng(2), 200)
    error = np.abs((fixed.at(tokens, pairs) + 4 * layer.at(tokens, pairs)) / _law(tokens, pairs, np.full(200, 4)) - 1)
    assert np.median(error) < 0.03
    assert np.percentile(error, 95) < 0.08


def test_a_curve_never_falls() -> None:
    rng = np.random.default_rng(3)
    tokens, pairs, depth = _grid()
    layer, _ = fit_curves(tokens, pairs, depth, _law(tokens, pairs, depth) * rng.uniform(0.5, 1.5, tokens.size))
    sizes = np.linspace(1, 10_000, 500)
    assert (np.diff(layer.at(sizes, sizes * 64)) >= 0).all()
    assert (np.diff(layer.at(np.full(500, 2048.0), 2048 * sizes)) >= 0).all()
    # one sequence more never makes it cheaper
    assert (layer.at(sizes + 100, sizes**2 + 100**2) >= layer.at(sizes, sizes**2) - 1e-12).all()


def test_beyond_the_measured_it_goes_on_and_says_so() -> None:
    curve = Curve(
        base=1.0,
        token_knots=(10.0, 20.0),
        token_slopes=(0.3, 0.1),
        length_knots=(10.0,),
        length_slopes=(0.01,),
    )
    # 1 + 3 + 1 at 20 tokens, then with the mean slope 0.2; two sequences of 10: 20 · 0.1 for attention
    np.testing.assert_allclose(curve.at([0, 5, 20, 30]), [0, 2.5, 5, 7])
    np.testing.assert_allclose(curve.at([20], [200]), [5 + 20 * 0.1])
    assert curve.is_beyond([20, 21, 20], [200, 100, 400]).tolist() == [False, True, True]


def test_parts_without_layers_are_fixed() -> None:
    tokens = np.asarray([100.0, 200, 400])
    layer, fixed = fit_curves(tokens, tokens**2, np.zeros(3), 1e-3 + 1e-5 * tokens)
    assert layer == Curve()
    np.testing.assert_allclose(fixed.at([300]), [4e-3], rtol=0.01)


@pytest.mark.parametrize("values", [[], [0.0], [float("nan")]])
def test_points_that_are_none_are_refused(values: list[float]) -> None:
    size = [8.0] * len(values)
    with pytest.raises(ModelError, match="measured points"):
        fit_curves(size, size, size, values)


@pytest.mark.parametrize(
    "wrong", [{"token_slopes": (-1.0,)}, {"token_knots": (2.0, 1.0), "token_slopes": (1.0, 1.0)}, {"base": -1.0}]
)
def test_curves_that_would_fall_are_refused(wrong: dict) -> None:
    with pytest.raises(ModelError):
        Curve(**wrong)
