"""Reads a `ModelSpec` from a Hugging Face config, by the fields that are there.

In: a config object or dict. Out: a `ModelSpec`. Nothing of torch or transformers is imported: a config is any
object with attributes or any mapping.

Assumptions: a config does not always say what a block is made of. The rules used, each visible below:
an MLP is gated when its activation is SiLU, when the config says SwiGLU, for an LLM when it uses RMSNorm, and
for an encoder when it is built of LLM-like blocks (RoPE and a `head_dim` of its own). A class token exists
when the config has mask or register tokens, when it is CLIP-like, or when the model drops the first feature.
"""

from collections.abc import Mapping
from typing import Any

from hf_dflop.cost.audio import read_audio
from hf_dflop.cost.config_fields import get, is_merger_gated, size, square
from hf_dflop.cost.read_connector import read_connector
from hf_dflop.cost.spec import ConnectorSpec, ModelSpec, TransformerSpec
from hf_dflop.errors import ModelError

__all__ = ["read_config"]

_VISION_KEYS = ("vision_config", "visual_config", "vit_config", "vision_tower_config")
_TEXT_KEYS = ("text_config", "llm_config", "language_config")
_HIDDEN = ("embed_dim", "hidden_size", "d_model", "n_embd", "width")
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "n_layer", "layers")
_HEADS = ("num_attention_heads", "num_heads", "attention_heads", "n_head")
_WIDTHS = ("intermediate_size", "mlp_dim", "ffn_dim", "n_inner")
_SILU = ("silu", "swish", "swiglu")
_KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")

_REFUSED_TEXT = {
    "cross_attention_layers": "an LLM that reads the image by cross-attention",
    "kv_lora_rank": "latent (low-rank) KV attention",
    "hidden_size_per_layer_input": "per-layer input embeddings",
    "conv_L_cache": "an LLM with convolution layers",
    "intermediate_size_mlp": "a mixture of experts of which every one runs on every token",
}
_REFUSED_VISION = {
    "use_rel_pos": "an encoder with decomposed relative positions and a convolutional neck",
    "num_global_layers": "an encoder with extra global layers over padded tiles",
    "architecture": "an encoder that is defined in another library",
    "depths": "a hierarchical encoder",
}


def _refuse(config: Any, table: Mapping[str, str]) -> None:
    for name, what in table.items():
        value = get(config, name)
        if value:
            raise ModelError(
                f"the config has {name}={value!r}: {what} is not covered by the FLOP formulas. "
                "Build a ModelSpec by hand with the nearest dimensions and calibrate it with CostModel.fit."
            )


def read_config(config: Any) -> ModelSpec:
    """See [`ModelSpec.from_config`]."""
    vision_config = get(config, *_VISION_KEYS)
    if vision_config is None and get(config, "audio_config") is None:
        kind = get(config, "model_type", default=type(config).__name__)
        raise ModelError(
            f"the config of {kind!r} has no vision_config: costs need a model with an encoder of images, or of sounds "
            "(audio_config). Pass the config of a vision-language model, or of one that takes sounds."
        )
    text_config = get(config, *_TEXT_KEYS, default=config)
    _refuse(text_config, _REFUSED_TEXT)
    _refuse(vision_config, _REFUSED_VISION)
    try:
        if vision_config is None:
            return _read_hearing(config, text_config)
        return _read(config, vision_config, text_config)
    except (TypeError, ValueError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the config has a field of an unexpected kind ({error}): its structure is not understood. "
            "Build the spec by hand: ModelSpec(vision=TransformerSpec(...), ...)."
        ) from error


def _read_hearing(config: Any, text_config: Any) -> ModelSpec:
    """A model of sounds and text: its audio encoder takes the place of the vision encoder."""
    assumptions: list[str] = []
    llm = _read_llm(text_config, config)
    audio = read_audio(config, llm.hidden, assumptions)
    if audio is None:
        kind = get(config, "model_type", default=type(config).__name__)
        raise ModelError(
            f"the audio encoder of {kind!r} is not of Whisper's structure, and no other is covered by the FLOP "
            "formulas. Build a ModelSpec by hand (patch_size=0, audio=AudioSpec(...) with the nearest dimensions), "
            "and pass CostModel.analytic(spec) as cost_model."
        )
    layers = TransformerSpec(
        hidden=audio.hidden,
        num_layers=audio.num_layers,
        heads=audio.heads,
        kv_heads=audio.heads,
        head_dim=audio.hidden // audio.heads,
        intermediate=audio.intermediate,
        gated_mlp=False,
    )
    return ModelSpec(
        vision=layers,
        connector=ConnectorSpec(merge=audio.positions_per_token, linears=audio.linears),
        llm=llm,
        patch_size=0,
        audio=audio,
        assumptions=tuple(assumptions),
    )


def _read(config: Any, vision_config: Any, text_config: Any) -> ModelSpec:
    assumptions: list[str] = []
    vision = _read_encoder(vision_config, assumptions)
    llm = _read_llm(text_config, config)
    patch_size = square(get(vision_config, "patch_size", "spatial_patch_size", default=0), "patch_size")
    class_tokens = _class_tokens(config, vision_config)
    connector = read_connector(config, vision_config, vision, llm, patch_size, class_tokens, assumptions)
    return ModelSpec(
        vision=vision,
        connector=connector,
        llm=llm,
        patch_size=patch_size,
        channels=int(get(vision_config, "num_channels", "in_channels", "in_chans", default=3)),
        temporal_patch_size=int(get(vision_config, "temporal_patch_size", default=1)),
        class_tokens=class_tokens,
        pooling_head=bool(get(vision_config, "vision_use_head", default=False)),
        unread_vision_layers=_unread_layers(get(config, "vision_feature_layer", default=-1), vision.num_layers),
        image_token_id=get(config, "image_token_id", "image_token_index", "img_context_token_id"),
        audio=read_audio(config, llm.hidden, assumptions),
        assumptions=tuple(assumptions),
    )


def _unread_layers(feature_layer: Any, num_layers: int) -> int:
    """Layers above the highest one that is read; hidden state 0 is the input of layer 0, -1 the last output."""
    listed = feature_layer if isinstance(feature_layer, list | tuple) else [feature_layer]
    highest = max(index if index >= 0 else num_layers + 1 + index for index in listed)
    return max(num_layers - max(highest, 1), 0)


def _read_encoder(config: Any, assumptions: list[str]) -> TransformerSpec:
    hidden = size(config, _HIDDEN, "vision")
    num_layers = size(config, _LAYERS, "vision")
    heads = size(config, _HEADS, "vision")
    swiglu = bool(get(config, "use_swiglu_ffn", "use_gated_mlp", default=False))
    gated = swiglu or str(get(config, "hidden_act", "hidden_activation", default="")) in _SILU
    if not gated and get(config, "rope_parameters", "rope_theta") and get(config, "head_dim"):
        gated = True
        assumptions.append(
            "the encoder has RoPE and a head_dim of its own: its MLP is taken to be gated, and its attention to "
            "stay within one image (so with flash attention; dense kernels span all images of a microbatch)"
        )
    intermediate = get(config, *_WIDTHS)
    if intermediate is None:
        intermediate = int(hidden * get(config, "mlp_ratio", default=4))
        if get(config, "use_swiglu_ffn"):  # two thirds of the width, rounded up to a multiple of 8
            intermediate = (int(intermediate * 2 / 3) + 7) // 8 * 8
    if is_merger_gated(config):
        intermediate = size(config, ("out_hidden_size",), "vision")
    window_tokens = num_windowed = 0
    full_blocks = get(config, "fullatt_block_indexes")
    if get(config, "window_size") and full_blocks is not None:
        window_tokens = (int(get(config, "window_size")) // int(get(config, "patch_size"))) ** 2
        num_windowed = num_layers - len([i for i in set(full_blocks) if 0 <= i < num_layers])
    return TransformerSpec(
        hidden=hidden,
        num_layers=num_layers,
        heads=heads,
        kv_heads=int(get(config, "num_key_value_heads", default=heads)),
        head_dim=hidden // heads,
        intermediate=int(intermediate),
        gated_mlp=gated,
        window_tokens=window_tokens,
        num_windowed_layers=num_windowed,
    )


def _num_moe_layers(config: Any, num_layers: int) -> int:
    listed = get(config, "moe_layers")
    if listed is not None:
        return len(listed)
    types = get(config, "mlp_layer_types")
    if types is not None:
        return sum(kind == "sparse" for kind in types)
    first = int(get(config, "first_k_dense_replace", default=0))
    step = int(get(config, "decoder_sparse_step", "interleave_moe_layer_step", default=1))
    dense = set(get(config, "mlp_only_layers", default=()))
    return sum(i >= first and (i + 1) % step == 0 and i not in dense for i in range(num_layers))


def _read_llm(config: Any, whole_config: Any) -> TransformerSpec:
    hidden = size(config, ("hidden_size", "d_model", "n_embd"), "text")
    num_layers = size(config, _LAYERS, "text")
    heads = size(config, _HEADS, "text")
    activation = str(get(config, "hidden_act", "hidden_activation", "activation_function", default=""))
    layer_types = list(get(config, "layer_types", default=()))
    unknown = sorted(set(layer_types) - set(_KNOWN_LAYER_TYPES))
    if unknown:
        raise ModelError(
            f"the text config has layers of type {unknown[0]!r}; covered are {_KNOWN_LAYER_TYPES}. "
            "Build a ModelSpec by hand with the nearest dimensions and calibrate it with CostModel.fit."
        )
    window = get(config, "sliding_window", "attention_chunk_size") or 0
    if get(config, "use_sliding_window", default=True) is False:
        window = 0
    local = sum(kind in ("sliding_attention", "chunked_attention") for kind in layer_types)
    num_windowed = (local if layer_types else num_layers) if window else 0
    experts = int(get(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", default=0))
    dense = int(get(config, *_WIDTHS, default=4 * hidden))
    expert = shared = active = num_moe = 0
    if experts > 1:
        num_moe = _num_moe_layers(config, num_layers)
        active = int(get(config, "num_experts_per_tok", "moe_topk", "moe_k", default=1))
        expert = int(get(config, "moe_intermediate_size", default=dense))
        num_shared = int(get(config, "n_shared_experts", "moe_num_shared_experts", default=0))
        shared = int(get(config, "shared_expert_intermediate_size", default=num_shared * expert))
    return TransformerSpec(
        hidden=hidden,
        num_layers=num_layers,
        heads=heads,
        kv_heads=int(get(config, "num_key_value_heads", default=heads)),
        head_dim=int(get(config, "head_dim", default=hidden // heads)),
        intermediate=dense,
        gated_mlp=activation in _SILU or get(config, "rms_norm_eps") is not None,
        num_experts=experts if num_moe else 0,
        active_experts=active,
        expert_intermediate=expert,
        shared_intermediate=shared,
        num_moe_layers=num_moe,
        window_tokens=int(window) if num_windowed else 0,
        num_windowed_layers=num_windowed,
        vocab=size(config, ("vocab_size",), "text"),
        tied_embeddings=bool(
            get(
                whole_config,
                "tie_word_embeddings",
                default=get(config, "tie_word_embeddings", default=False),
            )
        ),
        norm_behind_mlp=get(config, "query_pre_attn_scalar") is not None,  # Gemma 2 and 3
    )


def _class_tokens(config: Any, vision_config: Any) -> int:
    registers = int(get(vision_config, "num_register_tokens", default=0))
    if get(vision_config, "vision_use_head") is not None:  # SigLIP pools with a probe, it has no class token
        return registers
    has_class_token = (
        registers > 0
        or get(vision_config, "use_mask_token") is not None
        or get(vision_config, "initializer_factor") is not None  # CLIP
        or get(config, "vision_feature_select_strategy") == "default"
    )
    return registers + int(has_class_token)
