"""Importing and planning stay possible without torch, and the public names are what they say."""

import subprocess
import sys

import pytest

import hf_dflop

HEAVY = ("torch", "transformers", "datasets", "accelerate", "evaluate", "trl")


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.split())


def test_importing_the_package_is_lazy() -> None:
    assert _modules_after("import hf_dflop") == set()


def test_shapes_cost_and_balance_run_without_torch() -> None:
    statement = (
        "import hf_dflop\n"
        "from hf_dflop import balance, cost, shapes\n"
        "hf_dflop.Shapes; hf_dflop.CostModel; hf_dflop.ModelSpec\n"
        "balance.assign([1.0, 2.0], [1.0, 1.0], num_ranks=2, num_slots=1, objective='step', padded=False)"
    )
    assert _modules_after(statement) == set()


def test_the_guard_can_fail() -> None:
    assert _modules_after("import torch") == {"torch"}


def test_every_exported_name_resolves_and_has_a_docstring() -> None:
    for name in hf_dflop.__all__:
        value = getattr(hf_dflop, name)
        assert name.startswith("__") or value.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = hf_dflop.nothing
