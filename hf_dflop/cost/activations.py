"""Bytes that autograd keeps per token for each part of a model, from its structure alone.

In: a `ModelSpec`, the number format, what is trained. Out: a `PartMemory` for each part. Counted is what a
transformer of Hugging Face saves between forward and backward, tensor by tensor:

    norm        its input (RMSNorm: in fp32), the normalised input, the scaled output that the matrices read
    attention   queries, keys, values, output, the output once more in the layout of the output matrix, log-sums
    scores      dense attention alone: the softmax of every (query, key) pair in fp32, and cast to the format
    MLP         gated: gate, activation, up, product; plain: input and output of the activation

Assumptions: dropout is off; an LLM whose MLP is gated has RMSNorm, another LayerNorm. Norms behind a block, query and
key norms and biases are not counted: a measured `ModelProfile` knows them.
"""

from dataclasses import dataclass

from hf_dflop.cost.parts import PARTS, PartState
from hf_dflop.cost.spec import ModelSpec, TransformerSpec
from hf_dflop.errors import ModelError

__all__ = ["DTYPE_BYTES", "PartMemory", "activation_memory", "dtype_bytes"]

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def dtype_bytes(dtype: str) -> int:
    """Bytes of a number.

    Raises:
        ModelError: a format that is not in `DTYPE_BYTES`.
    """
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype is {dtype!r}; use one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartMemory:
    """Activation bytes of one part (of one layer, for the layers), linear in what the microbatch holds.

    A token is a position that the part computes (an encoder position, also for the connector; an LLM position); a
    pair is a (query, key) pair of one attention sequence, so sequences of length n have Σ n² of them.
    """

    kept_per_token_bytes: float = 0.0
    """Kept from the forward of a microbatch to its backward."""
    kept_per_pair_bytes: float = 0.0
    extra_per_token_bytes: float = 0.0
    """Needed beside that while the microbatch is in its backward: gradients of activations, recomputation."""
    extra_per_pair_bytes: float = 0.0
    put_off_per_token_bytes: float = 0.0
    """Held beside what is kept, from the input's part of a split backward to the weights' part: gradients of what
    trained matrices and norms gave."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 0:
                raise ModelError(f"PartMemory.{name} is {getattr(self, name)}; bytes are >= 0.")


def _layer(spec: TransformerSpec, size: int, state: PartState, *, tp: int, dense: bool, llm: bool) -> PartMemory:
    """One layer without checkpointing; a frozen one keeps nothing."""
    hidden = float(spec.hidden)
    queries, keys = spec.heads * spec.head_dim / tp, spec.kv_heads * spec.head_dim / tp
    rms = llm and spec.gated_mlp
    norms = 2 * hidden * ((4 if rms else size) + size)
    scaled = 2 * hidden * size  # what the matrices read: kept for their weight gradients
    attention = (2 * queries + 2 * keys) * size + (0.0 if dense else 4.0 * spec.heads / tp)
    copied = queries * size
    share = spec.num_moe_layers / spec.num_layers
    width = (1 - share) * spec.intermediate
    width += share * (spec.active_experts * spec.expert_intermediate + spec.shared_intermediate)
    width /= tp
    inner, product = (3 if spec.gated_mlp else 1) * width * size, width * size
    routed = share * spec.active_experts * hidden * size * 2  # each expert's copy of its tokens, in and out
    kept = norms + attention + inner
    if state == "trained":
        kept += scaled + copied + product + routed
    scores = (4.0 + (size if size != 4 else 0)) * spec.heads / tp if dense else 0.0
    working = max((3 if spec.gated_mlp else 2) * width, 2 * (queries + keys)) * size + 2 * hidden * max(size, 4)
    if state == "frozen":
        return PartMemory(extra_per_token_bytes=working, extra_per_pair_bytes=scores)
    put_off = (queries + 2 * keys + (2 if spec.gated_mlp else 1) * width + 4 * hidden) * size
    return PartMemory(
        put_off_per_token_bytes=put_off if state == "trained" else 0.0,
        kept_per_token_bytes=kept,
        kept_per_pair_bytes=scores,
        extra_per_token_bytes=working,
        extra_per_pair_bytes=scores,
    )


def _checkpointed(layer: PartMemory, spec: TransformerSpec, size: int) -> PartMemory:
    """A layer that keeps its input alone, and builds the rest again in the backward."""
    return PartMemory(
        kept_per_token_bytes=float(spec.hidden * size),
        extra_per_token_bytes=layer.kept_per_token_bytes + layer.extra_per_token_bytes,
        extra_per_pair_bytes=layer.kept_per_pair_bytes + layer.extra_per_pair_bytes,
        put_off_per_token_bytes=layer.put_off_per_token_bytes,
    )


def activation_memory(
    spec: ModelSpec,
    states: dict[str, PartState],
    *,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    dense_attention: bool = False,
    tp: int = 1,
) -> dict[str, PartMemory]:
    """Activation bytes of every part.

    Args:
        spec (`ModelSpec`): the model.
        states (`dict`): what training does to each part, from `part_states`.
        dtype (`str`, defaults to `"bfloat16"`): format of activations.
        checkpointing (`bool`, defaults to `False`): layers keep their input alone.
        dense_attention (`bool`, defaults to `False`): attention keeps its scores (eager).
        tp (`int`, defaults to 1): tensor-parallel degree; what lies between the split matrices is on every rank.

    Returns:
        `dict`: a `PartMemory` for each of `PARTS`, as one rank holds it.

    Raises:
        ModelError: an unknown dtype.
    """
    size = dtype_bytes(dtype)
    parts = {part: PartMemory() for part in PARTS}
    vision = _layer(spec.vision, size, states["vision_layer"], tp=tp, dense=dense_attention, llm=False)
    llm = _layer(spec.llm, size, states["llm_layer"], tp=tp, dense=dense_attention, llm=True)
    if checkpointing:
        vision = _checkpointed(vision, spec.vision, size) if states["vision_layer"] != "frozen" else vision
        llm = _checkpointed(llm, spec.llm, size) if states["llm_layer"] != "frozen" else llm
    parts["vision_layer"], parts["llm_layer"] = vision, llm

    pixels = spec.channels * spec.temporal_patch_size * spec.patch_size**2
    if states["vision_fixed"] == "trained":
        parts["vision_fixed"] = PartMemory(kept_per_token_bytes=float((pixels + 2 * spec.vision.hidden) * size))
    if states["connector"] != "frozen":
        inputs = sum(fan_in for fan_in, _ in spec.connector.linears)
        between = sum(fan_out for _, fan_out in spec.connector.linears[:-1])
        rows = spec.connector.copies / spec.connector.merge
        kept = ((inputs if states["connector"] == "trained" else 0) + between) * rows * size
        parts["connector"] = PartMemory(kept_per_token_bytes=kept, extra_per_token_bytes=between * rows * size)

    hidden, vocab = spec.llm.hidden, spec.llm.vocab / tp
    if states["llm_fixed"] != "frozen":
        parts["llm_fixed"] = PartMemory(
            kept_per_token_bytes=float(hidden * (4 + 2 * size)),
            put_off_per_token_bytes=float(hidden * size) if states["llm_fixed"] == "trained" else 0.0,
        )
    logits = vocab * size  # the model's output, alive until the backward has run
    upcast = 0.0 if size >= 4 else vocab * 4.0
    if states["llm_head"] == "frozen":
        parts["llm_head"] = PartMemory(extra_per_token_bytes=logits + upcast + vocab * max(size, 4))
    else:  # log-probabilities are kept; their gradient comes in fp32 and is cast
        parts["llm_head"] = PartMemory(
            kept_per_token_bytes=logits + vocab * max(size, 4),
            extra_per_token_bytes=vocab * max(size, 4) + max(upcast and logits, 0.0),
            # Of its norm. The gradient of the logits takes the place of log-probabilities, which are freed.
            put_off_per_token_bytes=float(hidden * size) if states["llm_head"] == "trained" else 0.0,
        )
    return parts
