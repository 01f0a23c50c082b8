"""An encoder whose heads a tensor-parallel degree does not divide: heads that compute nothing fill it up.

In: a spec and a degree. Out: the spec as its ranks hold it, and what a rank computes against the whole encoder on one
GPU. A ViT with 25 heads runs as one with 28 on four ranks: its projections and attention take 28/25 of their time.

Assumptions: only where every head has its own keys; attention scores count like the projections before them, by their
share of the layers' matrices.
"""

from dataclasses import replace
from functools import lru_cache

from hf_dflop.cost import ModelSpec, TransformerSpec
from hf_dflop.cost.flops import linear_flops_per_position

__all__ = ["can_pad", "encoder_share", "padded_encoder"]


def can_pad(spec: TransformerSpec, tp: int) -> bool:
    """Whether heads may be filled up to a multiple of `tp`."""
    return spec.heads == spec.kv_heads and spec.heads >= tp


@lru_cache(maxsize=256)
def padded_encoder(spec: ModelSpec, tp: int) -> ModelSpec:
    """The model with as many encoder heads as `tp` ranks hold together."""
    vision = spec.vision
    if vision.heads % tp == 0 or not can_pad(vision, tp):
        return spec
    heads = -(-vision.heads // tp) * tp
    return replace(spec, vision=replace(vision, heads=heads, kv_heads=heads))


@lru_cache(maxsize=256)
def encoder_share(spec: ModelSpec, tp: int) -> float:
    """Seconds of the encoder on each of `tp` ranks ÷ its seconds on one GPU: 1 / tp, or more with padded heads.

    Example:
        >>> from hf_dflop.cost import ConnectorSpec
        >>> size = dict(hidden=6, num_layers=1, head_dim=2, intermediate=24, gated_mlp=False)
        >>> spec = ModelSpec(vision=TransformerSpec(**size, heads=3, kv_heads=3), patch_size=2,
        ...                  connector=ConnectorSpec(merge=1, linears=((6, 6),)),
        ...                  llm=TransformerSpec(**size, heads=3, kv_heads=3, vocab=20))
        >>> round(encoder_share(spec, 2), 4)  # 4 heads instead of 3 in a third of the work: (2/3 + 1/3 · 4/3) / 2
        0.5556
    """
    padded = padded_encoder(spec, tp)
    if padded is spec:
        return 1.0 / tp
    return linear_flops_per_position(padded.vision) / linear_flops_per_position(spec.vision) / tp
