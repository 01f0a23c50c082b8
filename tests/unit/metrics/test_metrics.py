import math

import pytest

from hf_dflop import metrics


def test_token_accuracy_ignores_unlabelled_positions() -> None:
    result = metrics.load("token_accuracy").compute(predictions=[5, 6, 7, 8], references=[5, 0, -100, 8])
    assert result == {"token_accuracy": 2 / 3, "num_label_tokens": 3}


def test_token_perplexity_of_a_fair_coin_is_two() -> None:
    result = metrics.load("token_perplexity").compute(
        predictions=[math.log(2), math.log(2), 99.0], references=[1, 2, -100]
    )
    assert result["token_perplexity"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["token_accuracy", "token_perplexity"])
def test_no_label_token_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no label token"):
        metrics.load(name).compute(predictions=[1, 2], references=[-100, -100])


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="token_accuracy"):
        metrics.load("bleu")


def test_load_balance_by_hand() -> None:
    # Steps of 4 s and 6 s of the slowest rank; the mean rank is busy 3 s and 5 s.
    result = metrics.load("load_balance").compute(predictions=[[4.0, 2.0], [4.0, 6.0]])
    assert result["load_balance"] == pytest.approx(10 / 8)
    assert result["idle_fraction"] == pytest.approx(2 / 10)
    even = metrics.load("load_balance").compute(predictions=[[2.0, 2.0, 2.0]])
    assert even == {"load_balance": 1.0, "idle_fraction": 0.0}


def test_idle_fraction_by_hand() -> None:
    result = metrics.load("idle_fraction").compute(predictions=[[0.0, 2.0], [1.0, 0.0]], references=[7.0, 3.0])
    assert result == {"idle_fraction": pytest.approx(0.75 / 5), "idle_s": 0.75}


def test_throughput_is_total_over_total() -> None:
    result = metrics.load("throughput").compute(predictions=[10, 30], references=[1.0, 4.0])
    assert result == {"throughput_per_s": 8.0, "mean_step_s": 2.5}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("load_balance", {"predictions": [[1.0, 2.0], [1.0]]}),
        ("load_balance", {"predictions": [[0.0, 0.0]]}),
        ("load_balance", {"predictions": [[float("nan"), 1.0]]}),
        ("idle_fraction", {"predictions": [[1.0, 2.0], [1.0]], "references": [1.0, 1.0]}),
        ("idle_fraction", {"predictions": [[0.0, 0.0]], "references": [0.0]}),
        ("throughput", {"predictions": [4], "references": [0.0]}),
    ],
)
def test_measurements_that_say_nothing_are_errors(name: str, inputs: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"number of ranks|numbers of ranks|seconds must"):
        metrics.load(name).compute(**inputs)
