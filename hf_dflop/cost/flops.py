"""Counts FLOPs of samples from their shapes: forward and training, per module.

In: a `ModelSpec` and `Shapes`. Out: float64 arrays, one number per sample. A multiply-add is 2 FLOPs. Counted
are the matrix products (Kaplan et al., arXiv 2001.08361, section 2.1, with grouped KV heads, gating and
experts), term by term; norms, activations, positions and the optimizer are not.

Assumptions: a tile (an attention sequence of the encoder) is a crop, an image or a frame; in a windowed
encoder it is the whole image, and windows are full. The LM head runs on all positions, as Hugging Face models
do in training.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hf_dflop.cost.audio import AUDIO_TERMS, audio_factors, audio_terms
from hf_dflop.cost.spec import ModelSpec, TransformerSpec
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = [
    "ModuleFlops",
    "Trainable",
    "encoder_counts",
    "forward_terms",
    "linear_flops_per_position",
    "llm_flops",
    "llm_terms",
    "module_flops",
    "train_factors",
    "training_flops",
]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainable:
    """Which modules are trained; the LM head goes with the LLM."""

    vision: bool = True
    connector: bool = True
    llm: bool = True
    llm_adapters: bool = False
    """A frozen LLM carries low-rank adapters: gradients pass all of it (the adapters' FLOPs are not counted)."""
    inputs_require_grad: bool | None = None
    """The outputs of patch and token embeddings require gradients, so that gradients pass frozen modules too.
    transformers switches this on together with activation checkpointing (`enable_input_require_grads`); None
    follows the `checkpointing` argument."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleFlops:
    """FLOPs of each module; every field is a float64 array of shape `(num_samples,)`."""

    vision: FloatArray
    connector: FloatArray
    llm: FloatArray
    """The LLM's layers, without the LM head."""
    llm_head: FloatArray
    audio: FloatArray
    """Audio encoder and its projection; 0 where the model has none."""

    @property
    def total(self) -> FloatArray:
        """Sum over the modules, `(num_samples,)`."""
        return self.vision + self.connector + self.llm + self.llm_head + self.audio


def linear_flops_per_position(spec: TransformerSpec) -> float:
    """Forward FLOPs of the layers' weights for one position: projections and MLPs."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = 2 * spec.hidden * (2 * queries + 2 * keys)
    matrices = 3 if spec.gated_mlp else 2
    dense = 2 * matrices * spec.hidden * spec.intermediate
    width = spec.active_experts * spec.expert_intermediate + spec.shared_intermediate
    sparse = 2 * matrices * spec.hidden * width + 2 * spec.hidden * spec.num_experts
    num_dense = spec.num_layers - spec.num_moe_layers
    return float(spec.num_layers * projections + num_dense * dense + spec.num_moe_layers * sparse)


def _attention_flops_per_pair(spec: TransformerSpec) -> float:
    """Forward FLOPs of one layer for one (query, key) pair: the score and the weighted sum."""
    return 4.0 * spec.heads * spec.head_dim


def llm_terms(spec: ModelSpec, tokens: npt.ArrayLike, *, causal_factor: float = 0.5) -> dict[str, FloatArray]:
    """Forward FLOPs of LLM rows of any length, by term.

    Args:
        spec (`ModelSpec`): the model.
        tokens (`(num_rows,)` of int): positions of each row, padding included.
        causal_factor (`float`, defaults to 0.5):
            Share of the `tokens²` (query, key) pairs that the attention kernel computes: 0.5 for kernels that
            skip what the causal mask hides (flash attention), 1.0 for dense kernels, which is also what
            `torch.utils.flop_counter` counts. At 1.0 sliding windows save nothing either; below it a layer
            with window w computes `2 · causal_factor · (w · tokens - w² / 2)` pairs of rows longer than w.

    Returns:
        `dict`: `llm_linear`, `llm_attention` and `llm_head`, each float64 `(num_rows,)`.

    Raises:
        ModelError: `causal_factor` is not in (0, 1], or a length is negative.
    """
    if not 0 < causal_factor <= 1:
        raise ModelError(f"causal_factor is {causal_factor}; it must lie in (0, 1]. Use 0.5 (flash) or 1.0 (dense).")
    length = np.asarray(tokens, dtype=np.float64)
    if length.size and length.min() < 0:
        raise ModelError(f"a row has {length.min():.0f} tokens; lengths must be >= 0. Check the shape columns.")
    llm = spec.llm
    global_pairs = causal_factor * length**2
    window_pairs = global_pairs
    if llm.num_windowed_layers and causal_factor < 1:
        window = float(llm.window_tokens)
        beyond = 2 * causal_factor * (window * length - window**2 / 2)
        window_pairs = np.where(length > window, beyond, global_pairs)
    num_global = llm.num_layers - llm.num_windowed_layers
    pairs = num_global * global_pairs + llm.num_windowed_layers * window_pairs
    return {
        "llm_linear": linear_flops_per_position(llm) * length,
        "llm_attention": _attention_flops_per_pair(llm) * pairs,
        "llm_head": 2.0 * llm.hidden * llm.vocab * length,
    }


def llm_flops(spec: ModelSpec, tokens: npt.ArrayLike, *, causal_factor: float = 0.5) -> FloatArray:
    """Forward FLOPs of LLM rows of any length, LM head included, so that padded rows can be priced.

    Takes and raises what `llm_terms` does; returns float64 `(num_rows,)`, growing with the length.
    """
    terms = llm_terms(spec, tokens, causal_factor=causal_factor)
    return terms["llm_linear"] + terms["llm_attention"] + terms["llm_head"]


def encoder_counts(spec: ModelSpec, shapes: Shapes) -> tuple[FloatArray, FloatArray]:
    """Encoder positions of each sample and its attention pairs, class tokens included, each float64 `(num_samples,)`.

    With n patches and c class tokens per tile, a tile has (n + c)² attention pairs, so a sample has
    `image_patches_sq + 2c · image_patches + c² · image_tiles`.
    """
    patches = shapes.image_patches.astype(np.float64)
    tiles = shapes.image_tiles.astype(np.float64)
    extra = spec.class_tokens
    return patches + extra * tiles, shapes.image_patches_sq + 2.0 * extra * patches + extra**2 * tiles


def vision_terms(spec: ModelSpec, shapes: Shapes) -> dict[str, FloatArray]:
    """Forward FLOPs of encoders and connector by term, each float64 `(num_samples,)`; of sounds with a spec of them.

    Raises:
        ModelError: there are sounds, and the spec has no audio encoder; or images, and it has none of those.
    """
    if not spec.takes_images and shapes.num_images.any():
        raise ModelError(
            f"{int((shapes.num_images > 0).sum())} samples have images, and the model takes sounds alone: drop them."
        )
    if spec.audio is None and shapes.num_audios.any():
        raise ModelError(
            f"{int((shapes.num_audios > 0).sum())} samples have sounds, and the spec has no audio encoder: the model "
            "has none, or one that is not covered. Set ModelSpec.audio to the nearest AudioSpec and pass "
            "CostModel.analytic(spec) as cost_model, or drop the samples."
        )
    vision = spec.vision
    patches = shapes.image_patches.astype(np.float64)
    tiles = shapes.image_tiles.astype(np.float64)
    positions, pairs = encoder_counts(spec, shapes)
    window_pairs = np.minimum(pairs, float(vision.window_tokens) * positions)
    num_global = vision.num_layers - vision.num_windowed_layers
    layer_pairs = num_global * pairs + vision.num_windowed_layers * window_pairs
    patch_values = spec.channels * spec.temporal_patch_size * spec.patch_size**2

    pooling = np.zeros_like(patches)
    if spec.pooling_head:  # keys and values of all positions; query, output and MLP of one probe per tile
        per_tile = 4 * vision.hidden**2 + 4 * vision.hidden * vision.intermediate
        pooling = (4 * vision.hidden**2 + 4 * vision.hidden) * positions + per_tile * tiles

    connector = spec.connector
    rows = connector.copies * (positions if connector.keeps_class_tokens else patches) / connector.merge
    sizes = [2.0 * fan_in * fan_out for fan_in, fan_out in connector.linears]
    return {
        "patch_embed": 2.0 * patch_values * vision.hidden * patches,
        "vision_linear": linear_flops_per_position(vision) * positions,
        "vision_attention": _attention_flops_per_pair(vision) * layer_pairs,
        "vision_pooling": pooling,
        "connector_first": sizes[0] * rows,
        "connector_rest": sum(sizes[1:]) * rows,
        **({} if spec.audio is None else audio_terms(spec.audio, shapes)),
    }


def forward_terms(spec: ModelSpec, shapes: Shapes, *, causal_factor: float = 0.5) -> dict[str, FloatArray]:
    """Forward FLOPs of each sample by term (the union of encoder, connector and LLM terms).

    Takes and raises what `llm_terms` does, with the samples' own lengths; each term is float64
    `(num_samples,)`.
    """
    return {**vision_terms(spec, shapes), **llm_terms(spec, shapes.llm_tokens, causal_factor=causal_factor)}


def _recomputed_share(spec: TransformerSpec) -> float:
    """Share of the layers' linear FLOPs that checkpointing repeats: a layer's last matrix is not needed again."""
    if spec.norm_behind_mlp:
        return 1.0
    num_dense = spec.num_layers - spec.num_moe_layers
    last = 2.0 * num_dense * spec.hidden * spec.intermediate
    return 1.0 - last / linear_flops_per_position(spec)


def train_factors(
    spec: ModelSpec, trainable: Trainable | None = None, *, checkpointing: bool = False
) -> dict[str, float]:
    """How many times its forward FLOPs each term costs in one training step (forward + backward + recompute).

    Forward: 1. Backward of trained weights: 2. Of frozen weights that a gradient passes: 1, but 2 for attention
    scores, which have no weights and are differentiated in both operands. Where no gradient passes: 0. The lowest
    trained matrices (patch embedding; a connector without a norm in front, above a frozen encoder) need no input
    gradient: 1. Checkpointing repeats the layers that a gradient passes, all but their last dense matrix
    (layers with a norm behind the MLP, as in Gemma 3, repeat that too).
    Encoder layers above the one that is read get no gradient, nor does an unused pooling head.

    Args:
        spec (`ModelSpec`): the model.
        trainable (`Trainable`, defaults to everything): what is trained.
        checkpointing (`bool`, defaults to `False`): activations of encoder and LLM layers are recomputed.

    Returns:
        `dict`: a factor for each term of `forward_terms`.
    """
    train = trainable or Trainable()
    forced = checkpointing if train.inputs_require_grad is None else train.inputs_require_grad
    through_vision = train.vision or forced
    through_connector = through_vision or train.connector
    through_llm = through_connector or train.llm or train.llm_adapters
    recompute = float(checkpointing)
    read = 1.0 - spec.unread_vision_layers / spec.vision.num_layers

    def weights(trained: bool, passed: bool) -> float:
        return (2.0 if trained else 1.0) if passed else 0.0

    connector = 1.0 + weights(train.connector, through_connector)
    input_gradient = through_vision or spec.connector.input_norm or not train.connector
    vision_again = recompute * _recomputed_share(spec.vision)
    llm_again = recompute * _recomputed_share(spec.llm) * through_llm
    sounds: dict[str, float] = {}
    if spec.audio is not None:
        sounds = audio_factors(
            spec.audio,
            encoder=train.vision,
            connector=train.connector,
            passed=through_vision,
            recompute=checkpointing,
        )
    return {
        **sounds,
        "patch_embed": 2.0 if train.vision else 1.0,
        "vision_linear": 1.0 + (weights(train.vision, True) + vision_again) * read * through_vision,
        "vision_attention": 1.0 + (2.0 + recompute) * read * through_vision,
        "vision_pooling": 1.0,
        "connector_first": connector if input_gradient else 2.0,
        "connector_rest": connector,
        "llm_linear": 1.0 + weights(train.llm, through_llm) + llm_again,
        "llm_attention": 1.0 + (2.0 + recompute) * through_llm,
        "llm_head": 1.0 + weights(train.llm, through_llm),
    }


def _by_module(terms: dict[str, FloatArray]) -> ModuleFlops:
    return ModuleFlops(
        vision=terms["patch_embed"] + terms["vision_linear"] + terms["vision_attention"] + terms["vision_pooling"],
        connector=terms["connector_first"] + terms["connector_rest"],
        llm=terms["llm_linear"] + terms["llm_attention"],
        llm_head=terms["llm_head"],
        audio=sum((terms[name] for name in AUDIO_TERMS if name in terms), np.zeros_like(terms["llm_head"])),
    )


def module_flops(spec: ModelSpec, shapes: Shapes, *, causal_factor: float = 0.5) -> ModuleFlops:
    """Forward FLOPs of each module for each sample.

    Args:
        spec (`ModelSpec`): the model.
        shapes (`Shapes`): the samples.
        causal_factor (`float`, defaults to 0.5): see `llm_terms`; 1.0 to compare with torch's counter.

    Returns:
        `ModuleFlops`: float64 arrays of shape `(num_samples,)`.

    Raises:
        ModelError: `causal_factor` is not in (0, 1].
    """
    return _by_module(forward_terms(spec, shapes, causal_factor=causal_factor))


def training_flops(
    spec: ModelSpec,
    shapes: Shapes,
    trainable: Trainable | None = None,
    checkpointing: bool = False,
    *,
    causal_factor: float = 0.5,
) -> ModuleFlops:
    """FLOPs of forward, backward and recomputation of each module for each sample.

    `trainable` defaults to everything; the multiples are those of `train_factors`. Kernels that recompute
    attention scores in the backward (flash attention: 2.5 instead of 2 times the forward) do more than is
    counted here. Takes, returns and raises otherwise what `module_flops` does.
    """
    factors = train_factors(spec, trainable, checkpointing=checkpointing)
    terms = forward_terms(spec, shapes, causal_factor=causal_factor)
    return _by_module({name: flops * factors[name] for name, flops in terms.items()})
