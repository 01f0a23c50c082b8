"""Numbers of parameters of each part of a model, from its structure.

Assumptions: biases are not counted (below one per cent), nor are positions that are learned; norms have one vector. A
measured `ModelProfile` counts the real modules.
"""

from hf_dflop.cost.parts import PARTS
from hf_dflop.cost.spec import ModelSpec, TransformerSpec

__all__ = ["parameter_counts"]


def _per_layer(spec: TransformerSpec, tp: int) -> float:
    attention = spec.hidden * (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    matrices = 3 if spec.gated_mlp else 2
    dense = matrices * spec.hidden * spec.intermediate
    experts = spec.num_experts * spec.expert_intermediate + spec.shared_intermediate
    share = spec.num_moe_layers / spec.num_layers
    split = attention + (1 - share) * dense + share * matrices * spec.hidden * experts
    return split / tp + share * spec.hidden * spec.num_experts + 2 * spec.hidden


def parameter_counts(spec: ModelSpec, *, tp: int = 1) -> dict[str, int]:
    """Parameters of each part as one tensor-parallel rank holds it; of one mean layer, for the layers.

    Token embeddings are in `llm_fixed` and the LM head's matrix in `llm_head`, also where the two are tied (who holds
    both then subtracts one). Embeddings and head are split over the vocabulary; the encoder's embedding and the
    connector are on every rank.

    Example:
        >>> from hf_dflop.cost import ConnectorSpec, ModelSpec, TransformerSpec
        >>> size = dict(hidden=4, num_layers=1, heads=2, kv_heads=2, head_dim=2, intermediate=8, gated_mlp=False)
        >>> spec = ModelSpec(vision=TransformerSpec(**size), connector=ConnectorSpec(merge=1, linears=((4, 4),)),
        ...                  llm=TransformerSpec(**size, vocab=20), patch_size=2)
        >>> parameter_counts(spec)["llm_layer"]  # 4·4² attention, 2·4·8 MLP, 2·4 norms
        136
    """
    counts = dict.fromkeys(PARTS, 0.0)
    pixels = spec.channels * spec.temporal_patch_size * spec.patch_size**2
    counts["vision_fixed"] = spec.vision.hidden * (pixels + 2)
    if spec.pooling_head:
        counts["vision_fixed"] += 4 * spec.vision.hidden**2 + 2 * spec.vision.hidden * spec.vision.intermediate
    counts["vision_layer"] = _per_layer(spec.vision, tp)
    counts["connector"] = spec.connector.copies * sum(a * b for a, b in spec.connector.linears)
    counts["llm_fixed"] = spec.llm.vocab * spec.llm.hidden / tp + spec.llm.hidden
    counts["llm_layer"] = _per_layer(spec.llm, tp)
    counts["llm_head"] = spec.llm.vocab * spec.llm.hidden / tp
    return {part: round(count) for part, count in counts.items()}
