"""Every image-text processor of the installed transformers: exact at thirty sizes, or refused for a reason."""

import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from tests.unit.profile.audio_check import LENGTHS, audio_verdict
from tests.unit.profile.family_check import SIZES, table, verdict
from tests.unit.rows.audio_families import audio_families
from tests.unit.rows.families import families, processor_class

FAMILIES = sorted(families())
PAGE = Path(__file__).parents[3] / "docs" / "processors.md"
OF_PAGE = re.search(r"\((\d+\.\d+\.\d+)\)", PAGE.read_text(encoding="utf-8"))
"""The version of transformers that the page tells of. How many families are exact is told of it, and of later ones."""


def skip_older() -> None:
    assert OF_PAGE is not None
    if Version(transformers.__version__) < Version(OF_PAGE[1]):
        pytest.skip("fewer processors of an older transformers can be counted; none is counted wrongly")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_counted_wrongly(family: str) -> None:
    found = verdict(family)
    assert found.result in ("exact", "refused", "not checked"), found.reason
    assert found.result == "exact" or found.reason
    assert not found.videos.startswith("wrong"), found.videos


def test_enough_families_are_exact() -> None:
    exact = [family for family in FAMILIES if verdict(family).result == "exact"]
    assert len(set(SIZES)) >= 30
    assert len({processor_class(family) for family in exact}) >= 25, exact
    computed = [family for family in exact if verdict(family).structure != "processed"]
    assert len({processor_class(family) for family in computed}) >= 25, computed


def test_enough_families_are_exact_for_videos() -> None:
    skip_older()
    exact = {family for family in FAMILIES if verdict(family).videos.startswith("exact")}
    assert {
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "llava_onevision",
        "llava_next_video",
        "internvl",
        "smolvlm",
    } <= exact
    assert len(exact) >= 20, exact


def test_no_family_counts_sounds_wrongly() -> None:
    found = {family: audio_verdict(family) for family in audio_families()}
    assert not {family: told for family, told in found.items() if told.startswith("wrong")}
    skip_older()
    exact = {family for family, told in found.items() if told == "exact"}
    assert len(LENGTHS) >= 20
    assert {"qwen2_audio", "qwen2_5_omni", "audioflamingo3", "gemma4"} <= exact, found
    assert "depends on the others of its microbatch" in found["qwen3_omni_moe"]


def test_the_table_of_the_docs_is_what_is_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"({transformers.__version__})" not in page:
        pytest.skip("the table was made with another version of transformers")
    assert page == table(), "run: python -m tests.unit.profile.family_check > docs/processors.md"
