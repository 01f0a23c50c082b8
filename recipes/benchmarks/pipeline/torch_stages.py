"""The modules of our stages as torch's own engine takes them: positional tensors in, one tensor out.

In: a `VisionPart` or `LlmPart`, the format of features. Out: a module for torch's `PipelineStage`.

Assumption: all microbatches have one shape.
"""

from typing import Any

import torch
from torch import nn

from hf_dflop.pipeline.features import FeatureFormat

__all__ = ["TorchLlm", "TorchVision"]


class TorchVision(nn.Module):
    """Stage 0 for torch's engine: tiles -> rows of features."""

    def __init__(self, part: Any, form: FeatureFormat) -> None:
        super().__init__()
        self.part, self.form = part, form

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.part({"pixel_values": pixel_values}, None, {"image": self.form})
        return rows.clone() if rows._is_view() else rows


class TorchLlm(nn.Module):
    """Stage 1 for torch's engine; only the first `num_features` rows are of real tiles."""

    def __init__(self, part: Any, form: FeatureFormat) -> None:
        super().__init__()
        self.part, self.form = part, form

    def forward(self, features: torch.Tensor, num_features: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        count = int(num_features[0])
        divisor = inputs.pop("divisor")[0]
        received = features[:count] if count else None
        loss = self.part(inputs, received, {"image": self.form}, divisor).loss
        if not count:
            loss = loss + (0.0 * features).sum()  # torch wants a gradient of every input, and a contiguous one
        return loss.unsqueeze(0)
