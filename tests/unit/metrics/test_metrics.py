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


@pytest.mark.parametrize("name", metrics.METRICS)
def test_no_label_token_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no label token"):
        metrics.load(name).compute(predictions=[1, 2], references=[-100, -100])


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="token_accuracy"):
        metrics.load("bleu")
