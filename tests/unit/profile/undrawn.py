"""Profiles saved without figures and report, for tests that look at neither: drawing takes most of the time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dflop.profile.report._draw", lambda *_: None)
        patch.setattr("hf_dflop.profile.page.render_page", lambda *_, **__: "")
        yield
