"""Every public name is described in the docs, and the callback's table names exactly the keys that it logs."""

import re
from pathlib import Path

import numpy as np

import hf_dflop
from hf_dflop.integrations.correction import LOG_KEYS
from hf_dflop.integrations.steplog import step_logs

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in hf_dflop.__all__ if not name.startswith("__") and f"`{name}`" not in page]
    assert not missing


def test_the_docstring_of_the_callback_lists_the_logged_keys() -> None:
    documented = set(re.findall(r"`(dflop/[a-z_<>]+)`", hf_dflop.DflopCallback.__doc__ or ""))
    measured = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4) + 1
    logged = {re.sub(r"rank\d+$", "rank<r>", key) for key in step_logs(measured, [])}
    planned = {
        *("dflop/predicted_idle_stock", "dflop/predicted_idle", "dflop/gap"),
        *("dflop/scheduling_s", "dflop/scheduling_wait_s"),
    }
    assert documented == logged | planned | set(LOG_KEYS)
