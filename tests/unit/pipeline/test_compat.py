"""Features enter a forward that takes no `mm_encoder_outputs` as they do one that takes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_dflop.errors import ModelError
from hf_dflop.pipeline import _compat
from hf_dflop.pipeline._compat import call_with_features, encoder_inputs
from hf_dflop.pipeline.check import run_whole
from hf_dflop.pipeline.features import read_format
from hf_dflop.pipeline.split import build_part
from hf_dflop.pipeline.structure import read_structure
from tests.distributed import pipelines


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(_compat, "_takes_outputs", lambda body: False)
