"""The benchmark page equals what the JSON gives; samplers cover each sample once; solvers give partitions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from recipes.benchmarks.balancing.clocks import median_clocks, seconds_and_waiting
from recipes.benchmarks.common.figures import digest_of
from recipes.benchmarks.common.mixes import MIXES, draw_mix
from recipes.benchmarks.common.page import (
    DOCS,
    README,
    page_figures,
    page_text,
    readme_text,
    stored_results,
    write_page,
)
from recipes.benchmarks.common.results import Result, load, make_result, save
from recipes.benchmarks.common.samplers import SAMPLERS, SamplerInput
from recipes.benchmarks.common.tables import spread, table
from recipes.benchmarks.partition.__main__ import measure
from recipes.benchmarks.scale.simulate import SIMULATED, draw_epoch, efficiency
from recipes.benchmarks.smoke import BOUNDS, check

pytest.importorskip("matplotlib")


def test_the_page_is_what_the_stored_results_give() -> None:
    results = stored_results()
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == page_text(results)
    figures = page_figures(results)
    assert figures
    for figure in figures:
        assert digest_of(DOCS / "benchmarks" / f"{figure.name}.svg") == figure.digest, figure.name
    readme = README.read_text(encoding="utf-8")
    assert readme_text(readme, results) == readme


def test_another_number_makes_another_page(tmp_path: Path) -> None:
    results = stored_results()
    result = results["partition"]
    assert result is not None
    rows = [dict(row) for row in result.rows]
    rows[0]["load_to_bound"] += 1
    changed = results | {"partition": dataclasses.replace(result, rows=rows)}
    assert page_text(changed) != page_text(results)
    assert [f.digest for f in page_figures(changed)] != [f.digest for f in page_figures(results)]


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text(encoding="utf-8").replace("Median", "Typed by hand:"), encoding="utf-8")
    written = write_page(tmp_path, readme)
    assert written[0].read_text(encoding="utf-8") == page_text(stored_results())
    assert written[1].read_text(encoding="utf-8") == README.read_text(encoding="utf-8")
    assert {path.suffix for path in written[2:]} == {".svg"}
    for path in written[2:]:
        assert path.stat().st_size < 300_000


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    result = make_result("partition", [{"kind": "a", "x": 1.5}], command="c", settings={"s": 1}, notes=["n"])
    path = save(result, tmp_path)
    assert load(path) == result
    path.write_text(path.read_text(encoding="utf-8").replace('"schema_version": 1', '"schema_version": 0'))
    with pytest.raises(ValueError, match="schema version 0"):
        load(path)


def test_rows_of_a_kind_have_the_same_fields() -> None:
    with pytest.raises(ValueError, match="differ in their fields"):
        make_result("t", [{"kind": "a", "x": 1}, {"kind": "a", "y": 1}], command="", settings={})
    with pytest.raises(ValueError, match="no rows"):
        Result(topic="t", date="", command="", hardware="", versions={}, settings={}, rows=[], notes=[])


def _given(num_ranks: int, slots: int, batch: int, seed: int) -> SamplerInput:
    samples = draw_mix("onevision", num_ranks * slots * batch * 2, seed)
    order = np.random.default_rng(seed).permutation(len(samples.tiles)).reshape(-1, num_ranks, batch)
    tokens = samples.llm_tokens
    return SamplerInput(
        stock=[order[:, rank].tolist() for rank in range(num_ranks)],
        num_slots=slots,
        tokens=tokens,
        patches=samples.tiles * 37,
        llm_s=tokens.astype(float),
        seed=seed,
    )


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("num_ranks", "slots", "batch"), [(2, 3, 5), (4, 1, 2), (1, 2, 3)])
def test_samplers_of_others_deal_each_sample_once(name: str, num_ranks: int, slots: int, batch: int) -> None:
    given = _given(num_ranks, slots, batch, seed=num_ranks)
    deal = SAMPLERS[name](given)
    assert [len(groups) for groups in deal] == [len(groups) for groups in given.stock]
    assert all(group for groups in deal for group in groups)
    assert sorted(i for groups in deal for group in groups for i in group) == sorted(given.samples)
    assert SAMPLERS[name](given) == deal  # every rank deals alike


def test_llm_lpt_keeps_the_samples_of_a_step_and_balances_the_llm() -> None:
    given = _given(2, 3, 5, seed=0)
    deal = SAMPLERS["llm_lpt"](given)
    for step in (0, 3):
        own = sorted(i for slots in deal for group in slots[step : step + 3] for i in group)
        assert own == sorted(i for slots in given.stock for group in slots[step : step + 3] for i in group)
        loads = [sum(given.llm_s[i] for group in slots[step : step + 3] for i in group) for slots in deal]
        stock = [sum(given.llm_s[i] for group in slots[step : step + 3] for i in group) for slots in given.stock]
        assert max(loads) <= max(stock)


def test_visual_sorted_packs_are_dealt_by_their_visual_tokens() -> None:
    given = _given(2, 3, 5, seed=1)
    first, second = SAMPLERS["visual_sorted"](given)
    patches = [int(given.patches[pack].sum()) for pair in zip(first, second, strict=True) for pack in pair]
    assert patches == sorted(patches, reverse=True)


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_samplers_deal_each_sample_once(name: str) -> None:
    epoch = draw_epoch("onevision", 4, num_slots=2, batch_size=4, num_steps=2, seed=0, vision_share=1.0)
    for padded in (True, False):
        deal = SIMULATED[name](epoch, padded, "stage")
        assert sorted(i for groups in deal for group in groups for i in group) == list(range(len(epoch.shapes)))
        assert {len(groups) for groups in deal} == {4}
        found = efficiency(epoch, deal, padded=padded)
        assert 0 < found["stage"] <= found["slot"] <= found["step"] <= 1 + 1e-9


def test_efficiency_by_hand() -> None:
    """One rank has twice the work of the other, packed: three quarters of the time is useful."""
    epoch = draw_epoch("onevision", 2, num_slots=1, batch_size=1, num_steps=1, seed=0, vision_share=1.0)
    by_hand = dataclasses.replace(epoch, vision_s=np.array([0.0, 0.0]), llm_s=np.array([2.0, 1.0]))
    assert efficiency(by_hand, [[[0]], [[1]]], padded=False)["step"] == pytest.approx(0.75)
    assert efficiency(by_hand, [[[0, 1]], []][:1], padded=True)["step"] == pytest.approx(1.5 / 4.0)


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_are_drawn_alike_and_from_the_front(mix: str) -> None:
    few, many = draw_mix(mix, 10, 3), draw_mix(mix, 20, 3)
    assert few.text_tokens.tolist() == many.text_tokens[:10].tolist()
    assert (few.text_tokens >= 8).all()
    with pytest.raises(ValueError, match="unknown mix"):
        draw_mix("nothing", 1, 0)


def test_chart_doc_has_the_published_moments() -> None:
    """Weighted over the four sets: 3.97 tiles and 125 text tokens on average."""
    samples = draw_mix("chart_doc", 4000, 0)
    assert samples.tiles.mean() == pytest.approx(3.97, rel=0.03)
    assert samples.text_tokens.mean() == pytest.approx(125, rel=0.06)


def test_a_disturbed_repetition_does_not_count() -> None:
    def step(*slots: float) -> dict[str, object]:
        return {"data": 0.5, "slots": list(slots), "optimizer": 0.25}

    calm = [[step(1.0, 2.0)], [step(1.5, 1.0)]]
    disturbed = [[step(4.0, 2.0)], [step(1.5, 9.0)]]
    merged = median_clocks([calm, disturbed, calm])
    assert merged == calm
    seconds, waiting = seconds_and_waiting(merged)
    assert seconds == 3.0 + 0.5 + 0.25
    assert waiting == (3.0 - 2.75) / seconds
    with pytest.raises(ValueError, match="zip"):
        median_clocks([calm, calm[:1]])


def test_partition_runs_on_what_is_installed() -> None:
    rows, notes = measure(((24, 4),), (1.0,), seeds=1, cp_sat_seeds=0)
    by_solver = {row["solver"]: row["load_to_bound"] for row in rows}
    assert by_solver["hf_dflop, both costs"] <= min(by_solver["random"], by_solver["LPT on LLM cost"])
    assert all(value >= 1 - 1e-9 for value in by_solver.values())
    assert any(note.startswith("seq-len-balance") for note in notes)


def test_smoke_names_what_left_its_bounds() -> None:
    bounds: dict[str, list[float | None]] = {"a": [1.0, None], "b": [None, 2.0], "c": [0.0, 1.0]}
    assert check({"a": 1.5, "b": 1.5, "c": 0.5}, bounds) == []
    wrong = check({"a": 0.5, "b": 2.5, "d": 1.0}, bounds)
    assert [line.split()[0] for line in wrong] == ["d", "a", "b", "c"]
    assert json.loads(BOUNDS.read_text(encoding="utf-8"))


def test_tables_and_spreads() -> None:
    assert spread([2.0, 1.0, 4.0]) == "2.00 (1.00–4.00)"
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    with pytest.raises(ValueError, match="3 cells"):
        table(["a", "b"], [["1", "2", "3"]])
