"""The report page: what it says, and that it needs nothing from outside."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.profile import DatasetProfile, profile_dataset
from hf_dflop.profile.page import advice, render_page
from hf_dflop.profile.waiting import predict_waiting
from hf_dflop.shapes import Shapes
from tests.unit.profile.test_bad_rows import mixed
from tests.unit.profile.test_dataset import make
from tests.unit.rows import tiny

SUB = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
CONFIG = {
    "vision_config": SUB | {"patch_size": 14, "hidden_act": "gelu"},
    "text_config": SUB | {"hidden_act": "silu", "vocab_size": 32},
    "projector_hidden_act": "gelu",
}


def shapes_of(tokens: list[int]) -> Shapes:
    zeros = [0] * len(tokens)
    counts = dict.fromkeys(("num_images", "image_tiles", "image_patches", "image_patches_sq", "image_tokens"), zeros)
    return Shapes(**counts, text_tokens=tokens, label_tokens=zeros)


def test_waiting_of_equal_samples_is_none_and_of_a_tail_is_balanced_away() -> None:
    cost = CostModel.analytic(ModelSpec.from_config(CONFIG))
    for waiting in predict_waiting(shapes_of([100] * 64), cost, ranks=(2, 8)):
        assert waiting.idle_fraction == pytest.approx(0, abs=1e-9)
        assert waiting.time_to_stock == pytest.approx(1)
    tailed = predict_waiting(shapes_of([10] * 60 + [2000] * 4), cost, ranks=(8,))
    by_way = {waiting.way: waiting for waiting in tailed}
    assert by_way["stock"].idle_fraction > 0.3
    assert by_way["balanced"].time_to_stock < 0.9
    assert tailed == predict_waiting(shapes_of([10] * 60 + [2000] * 4), cost, ranks=(8,))


def test_advice_follows_the_prediction() -> None:
    spec = ModelSpec.from_config(CONFIG)
    for tokens, said in (([100] * 64, "the stock sampler is enough"), ([10] * 60 + [2000] * 4, "Balance this")):
        shapes = shapes_of(tokens)
        profile = DatasetProfile.from_shapes(shapes, spec=spec)
        assert said in advice(profile, predict_waiting(shapes, CostModel.analytic(spec), ranks=(2, 8)))
    assert "Pass the model's config" in advice(DatasetProfile.from_shapes(shapes), [])


def test_the_page_is_complete_and_self_contained(tmp_path: Path) -> None:
    data = make(24).add_column("source", [("photos", "a <b> & c", None)[i % 3] for i in range(24)])
    annotated, profile = profile_dataset(data, tiny.llava_next(), config=CONFIG)
    assert profile.subset_names == ("photos", "a <b> & c", "(none)")
    profile.save(tmp_path / "profile", dataset=annotated)
    page = (tmp_path / "profile" / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert page.count("plotly.js v") <= 2  # once in full
    assert "data:image/jpeg;base64," in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "<b> & c" not in text
    for words in ("How long would ranks wait", "64", "The 20 costliest samples", "All counts", "Which sub-datasets"):
        assert words in text
    loaded = DatasetProfile.load(tmp_path / "profile")
    assert loaded.spec == profile.spec
    assert loaded.subset is not None
    assert loaded.subset.tolist() == [i % 3 for i in range(24)]
    assert np.array_equal(loaded.subset, profile.subset)


def test_pages_without_a_config_with_errors_or_for_a_stream() -> None:
    data, _ = mixed()
    annotated, profile = profile_dataset(data, tiny.llava(), on_error="mark", verify=0)
    page = render_page(profile, annotated)
    assert "Rows that are not usable" in page
    assert "/nowhere/at/all.jpg" in page
    assert "How long would ranks wait" not in page.split("<body>")[1]
    text_only = datasets.Dataset.from_dict({"question": ["q"] * 3, "answer": ["a", "b c", "d e f"]})
    stream, profile = profile_dataset(text_only.to_iterable_dataset(), tiny.llava(), config=CONFIG)
    assert "rows of a stream" in render_page(profile, stream)
