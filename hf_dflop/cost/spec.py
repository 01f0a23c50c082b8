"""The structure of a model of images or sounds that costs are computed from: dimensions and counts, no weights.

`ModelSpec.from_config(config)` reads it from a Hugging Face config object (or its `to_dict()`), by the names
of the fields that are there, never by the name of the model. A spec can also be written by hand, changed with
`dataclasses.replace`, and kept as JSON.

Assumptions: one encoder and one decoder-only LLM in one sequence; all layers of a kind have one size. What a
config leaves open is filled with the usual choice, and the choice is listed in `ModelSpec.assumptions`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_dflop.cost.audio import AudioSpec
from hf_dflop.errors import ModelError

__all__ = ["SPEC_SCHEMA_VERSION", "ConnectorSpec", "ModelSpec", "TransformerSpec"]

SPEC_SCHEMA_VERSION = 1


def _require_positive(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{type(record).__name__}.{name} is {value!r}; it must be a whole number >= 1. "
                "Check the field of the model's config that it was read from."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSpec:
    """The transformer layers of an encoder or of an LLM.

    Raises:
        ModelError: a size is not a positive whole number, or a count exceeds the number of layers.
    """

    hidden: int
    """Width of the residual stream."""
    num_layers: int
    """Layers that a forward pass runs (an earlier feature layer does not shorten it: later ones still
    run)."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the dense MLP."""
    gated_mlp: bool
    """Three MLP matrices (gate, up, down) instead of two."""
    num_experts: int = 0
    """Routed experts of a mixture-of-experts layer; 0 for a dense model."""
    active_experts: int = 0
    """Routed experts that one token visits."""
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Summed MLP width of the experts that every token visits."""
    num_moe_layers: int = 0
    """Layers whose MLP is a mixture of experts; the other ones are dense."""
    window_tokens: int = 0
    """Encoder: positions of one attention window. LLM: sliding window length. 0: all layers are global."""
    num_windowed_layers: int = 0
    vocab: int = 0
    """Rows of the LM head; 0 for an encoder."""
    tied_embeddings: bool = False
    norm_behind_mlp: bool = False
    """A norm stands behind the MLP (Gemma 2 and 3), so recomputation repeats the MLP's last matrix too."""

    def __post_init__(self) -> None:
        _require_positive(self, "hidden", "num_layers", "heads", "kv_heads", "head_dim", "intermediate")
        for name in ("num_moe_layers", "num_windowed_layers"):
            if not 0 <= getattr(self, name) <= self.num_layers:
                raise ModelError(
                    f"TransformerSpec.{name} is {getattr(self, name)} of {self.num_layers} layers; "
                    "it must lie between 0 and num_layers."
                )
        if self.num_moe_layers:
            _require_positive(self, "num_experts", "active_experts", "expert_intermediate")
        if self.num_windowed_layers:
            _require_positive(self, "window_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorSpec:
    """The linear layers between encoder and LLM, run once per group of `merge` patches."""

    merge: int
    """Patches that become one connector position (1: none are merged)."""
    linears: tuple[tuple[int, int], ...]
    """(input width, output width) of each matrix, in order; a gated layer appears as its separate
    matrices."""
    copies: int = 1
    """Connectors of this size that run (one more for each deepstack level)."""
    input_norm: bool = False
    """A norm with weights stands before the first matrix, which so needs its input gradient."""
    keeps_class_tokens: bool = False
    """The encoder's class and register tokens go through the connector too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", tuple((int(a), int(b)) for a, b in self.linears))
        _require_positive(self, "merge", "copies")
        if not self.linears:
            raise ModelError("ConnectorSpec.linears is empty; give at least one (input, output) pair.")

    @property
    def input_dim(self) -> int:
        """Width of a connector position, after merging."""
        return self.linears[0][0]

    @property
    def output_dim(self) -> int:
        """Width of the image features that the LLM sees."""
        return self.linears[-1][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What costs need to know of a vision-language model, or of one that takes sounds.

    Example:
        >>> sub = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> spec = ModelSpec.from_config({
        ...     "vision_config": sub | {"patch_size": 14, "num_channels": 3, "hidden_act": "gelu"},
        ...     "text_config": sub | {"hidden_act": "silu", "vocab_size": 32}, "projector_hidden_act": "gelu",
        ...     "image_token_id": 31})
        >>> spec.llm.gated_mlp, spec.vision.gated_mlp, spec.connector.linears
        (True, False, ((8, 8), (8, 8)))
        >>> ModelSpec.from_json(spec.to_json()) == spec
        True
    """

    vision: TransformerSpec
    connector: ConnectorSpec
    llm: TransformerSpec
    patch_size: int
    """Side of a square patch, in pixels. 0: the model takes sounds and no images; `vision` and `connector` then tell
    the layers and the projection of `audio`."""
    channels: int = 3
    temporal_patch_size: int = 1
    """Frames that one patch spans."""
    class_tokens: int = 0
    """Class and register tokens that the encoder adds to each tile."""
    pooling_head: bool = False
    """The encoder ends in an attention-pooling head whose output nothing reads (SigLIP's
    `vision_use_head`)."""
    unread_vision_layers: int = 0
    """Last layers of the encoder that run forward although only earlier features are read (LLaVA's
    `vision_feature_layer=-2`): no gradient reaches them."""
    image_token_id: int | None = None
    audio: AudioSpec | None = None
    """The audio encoder; `None` where the model has none, or one that the formulas do not cover."""
    assumptions: tuple[str, ...] = ()
    """What the config did not say and was assumed, in sentences; empty when everything was read."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "assumptions", tuple(self.assumptions))
        if self.patch_size or self.audio is None:
            _require_positive(self, "patch_size")
        _require_positive(self, "channels", "temporal_patch_size")
        if not 0 <= self.unread_vision_layers < self.vision.num_layers:
            raise ModelError(
                f"unread_vision_layers is {self.unread_vision_layers} of {self.vision.num_layers} layers; "
                "at least one layer must be read."
            )
        if self.llm.vocab < 1:
            raise ModelError(f"the LLM's vocab is {self.llm.vocab}; it must be >= 1 to price the LM head.")

    @property
    def takes_images(self) -> bool:
        """Whether there is a vision encoder."""
        return self.patch_size > 0

    @classmethod
    def from_config(cls, config: Any) -> "ModelSpec":
        """Read the structure of a model from its Hugging Face config.

        Args:
            config (`PreTrainedConfig` or `dict`):
                A config with a vision or an audio sub-config and a text sub-config, or the dict that its `to_dict()`
                gives.

        Returns:
            `ModelSpec`: the structure, with what was assumed in `assumptions`. A connector that no rule
            recognises is taken to be a two-layer MLP without merging.

        Raises:
            ModelError: the config has no encoder, lacks a size, or describes a block that these
                formulas do not cover (cross-attention LLM, latent KV attention, linear attention,
                convolutional encoder): a spec written by hand is the way out.
        """
        from hf_dflop.cost.read_config import read_config

        return read_config(config)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON types, with the schema version."""
        fields = asdict(self)
        if self.audio is None:
            del fields["audio"]  # as in files of before
        return {"schema_version": SPEC_SCHEMA_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelSpec":
        """Inverse of `to_dict`.

        Raises:
            ModelError: the schema version is another one, or a field is missing or unknown.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != SPEC_SCHEMA_VERSION:
            raise ModelError(
                f"model spec has schema version {version!r}; hf_dflop here reads {SPEC_SCHEMA_VERSION}. "
                "Rebuild it with ModelSpec.from_config(config)."
            )
        try:
            fields["vision"] = TransformerSpec(**fields["vision"])
            fields["llm"] = TransformerSpec(**fields["llm"])
            fields["connector"] = ConnectorSpec(**fields["connector"])
            if fields.get("audio") is not None:
                fields["audio"] = AudioSpec.from_dict(fields["audio"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"model spec is not readable ({error}). Rebuild it with ModelSpec.from_config(config)."
            ) from error

    def to_json(self) -> str:
        """The spec as a JSON string."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Inverse of `to_json`; raises what `from_dict` raises."""
        return cls.from_dict(json.loads(text))
