"""Shared small specs for the cost tests."""

import pytest

from hf_dflop.cost import ConnectorSpec, ModelSpec, TransformerSpec
from hf_dflop.shapes import Shapes


@pytest.fixture
def spec() -> ModelSpec:
    """Small enough to count by hand."""
    return ModelSpec(
        vision=TransformerSpec(
            hidden=4, num_layers=1, heads=2, kv_heads=2, head_dim=2, intermediate=8, gated_mlp=False
        ),
        connector=ConnectorSpec(merge=1, linears=((4, 6), (6, 6))),
        llm=TransformerSpec(
            hidden=6, num_layers=2, heads=3, kv_heads=1, head_dim=2, intermediate=10, gated_mlp=True, vocab=20
        ),
        patch_size=2,
        class_tokens=1,
    )


@pytest.fixture
def shapes() -> Shapes:
    """A sample with one image of four patches, and a text-only one."""
    return Shapes(
        num_images=[1, 0],
        image_tiles=[1, 0],
        image_patches=[4, 0],
        image_patches_sq=[16, 0],
        image_tokens=[4, 0],
        text_tokens=[6, 3],
        label_tokens=[5, 2],
    )
