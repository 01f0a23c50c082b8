"""Reads the connector between encoder and LLM from a config, one rule per known structure.

Assumptions: a connector that no rule recognises (also resamplers, Q-Formers) is a two-layer MLP on all patches,
and the assumption is listed.
"""

from typing import Any

from hf_dflop.cost.config_fields import get, is_merger_gated, size, square
from hf_dflop.cost.spec import ConnectorSpec, TransformerSpec

__all__ = ["read_connector"]


def read_connector(
    config: Any,
    vision_config: Any,
    vision: TransformerSpec,
    llm: TransformerSpec,
    patch_size: int,
    class_tokens: int,
    assumptions: list[str],
) -> ConnectorSpec:
    hidden, out = vision.hidden, llm.hidden
    feature_layers = get(config, "vision_feature_layer", default=-1)
    num_features = len(feature_layers) if isinstance(feature_layers, list | tuple) else 1

    side = int(get(vision_config, "spatial_merge_size", default=0))
    linears: tuple[tuple[int, int], ...]
    if side and is_merger_gated(vision_config):  # GLM-V: strided convolution, projection, gated MLP
        width = int(get(vision_config, "intermediate_size"))
        linears = ((hidden * side**2, out), (out, out), (out, width), (out, width), (width, out))
        return ConnectorSpec(merge=side**2, linears=linears)
    if side:  # Qwen-VL: a merger at the end of the encoder, and one per deepstack level
        merged = hidden * side**2
        levels = len(get(vision_config, "deepstack_visual_indexes", default=()))
        linears = ((merged, merged), (merged, out))
        return ConnectorSpec(merge=side**2, linears=linears, copies=1 + levels, input_norm=True)
    if side := int(get(config, "spatial_merge_size", default=0)):  # Mistral 3: learned merging, then the MLP
        linears = ((hidden * side**2, hidden), (hidden * num_features, out), (out, out))
        return ConnectorSpec(merge=side**2, linears=linears, input_norm=True)
    if side := int(get(config, "scale_factor", default=0)):  # Idefics3: pixel shuffle and one matrix
        return ConnectorSpec(merge=side**2, linears=((hidden * side**2, out),))
    if ratio := get(config, "downsample_ratio"):  # InternVL: pixel shuffle and two matrices
        side = round(1 / float(ratio))
        linears = ((hidden * side**2, out), (out, out))
        return ConnectorSpec(merge=side**2, linears=linears, input_norm=True)
    if side := int(get(config, "downsample_factor", default=0)):  # pixel shuffle, then a plain or a gated MLP
        if width := get(config, "projector_hidden_size"):
            norm = bool(get(config, "projector_use_layernorm", default=False))
            linears = ((hidden * side**2, width), (width, out))
            return ConnectorSpec(merge=side**2, linears=linears, input_norm=norm)
        width = int(get(config, "alignment_intermediate_size", default=out))
        linears = ((hidden * side**2, width), (width // 2, out))
        norm = get(config, "adapter_layer_norm_eps") is not None
        return ConnectorSpec(merge=side**2, linears=linears, input_norm=norm)
    if tokens := get(config, "mm_tokens_per_image"):  # Gemma 3: average pooling and one matrix
        patches = (square(get(vision_config, "image_size"), "image_size") // patch_size) ** 2
        return ConnectorSpec(merge=max(patches // int(tokens), 1), linears=((hidden, out),), input_norm=True)
    if get(vision_config, "num_visual_indicator_tokens") is not None:  # Ovis: a visual vocabulary
        side = int(get(vision_config, "hidden_stride", default=1))
        rows = size(vision_config, ("vocab_size",), "vision")
        words = rows - int(get(vision_config, "num_visual_indicator_tokens"))
        return ConnectorSpec(merge=side**2, linears=((hidden * side**2, words), (rows, out)))
    keeps = get(config, "vision_feature_select_strategy") == "full" and class_tokens > 0
    projector = get(config, "projector_hidden_act", "multimodal_projector_bias")
    if projector is None and (width := get(config, "projection_dim")):  # PaliGemma: one matrix
        return ConnectorSpec(merge=1, linears=((hidden, int(width)),))
    if projector is None:
        assumptions.append("the connector is not described in the config: a two-layer MLP on all patches is assumed")
    linears = ((hidden * num_features, out), (out, out))
    norm = get(config, "projector_layernorm_eps") is not None
    return ConnectorSpec(merge=1, linears=linears, input_norm=norm, keeps_class_tokens=keeps)
