"""Reading configs, refusing what is not covered, JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from hf_dflop.cost import ConnectorSpec, ModelSpec, TransformerSpec
from hf_dflop.errors import ModelError

SUB = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
VISION = SUB | {"patch_size": [14, 14], "num_channels": 1, "hidden_act": "gelu"}
TEXT = SUB | {"hidden_act": "silu", "vocab_size": 32}


def config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {"vision_config": VISION | (vision or {}), "text_config": TEXT | (text or {}), **top}


def test_reads_objects_and_dicts_alike() -> None:
    class Config:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    flat = config(projector_hidden_act="gelu", image_token_index=7, tie_word_embeddings=True)
    as_object = Config(**flat | {"vision_config": Config(**VISION), "text_config": Config(**TEXT)})
    spec = ModelSpec.from_config(as_object)
    assert spec == ModelSpec.from_config(flat)
    assert (spec.patch_size, spec.channels, spec.image_token_id) == (14, 1, 7)
    assert spec.llm.tied_embeddings
    assert spec.assumptions == ()


def test_all_layers_run_whatever_the_feature_layer() -> None:
    spec = ModelSpec.from_config(config(projector_hidden_act="gelu", vision_feature_layer=[-2, 1]))
    assert spec.vision.num_layers == 4
    assert spec.unread_vision_layers == 1
    assert ModelSpec.from_config(config(vision_feature_layer=1)).unread_vision_layers == 3
    assert spec.connector.linears == ((16, 8), (8, 8))  # two feature layers, concatenated


def test_class_tokens() -> None:
    def count(vision: dict[str, Any], **top: Any) -> int:
        return ModelSpec.from_config(config(vision, **top)).class_tokens

    assert count({}) == 0
    assert count({}, vision_feature_select_strategy="default") == 1
    assert count({"initializer_factor": 1.0}) == 1
    assert count({"num_register_tokens": 4}) == 5
    assert count({"vision_use_head": False}, vision_feature_select_strategy="default") == 0


def test_mixture_of_experts_layers() -> None:
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    llm = ModelSpec.from_config(config(text=moe | {"decoder_sparse_step": 2})).llm
    assert (llm.num_moe_layers, llm.expert_intermediate, llm.shared_intermediate) == (2, 6, 0)
    llm = ModelSpec.from_config(config(text=moe | {"first_k_dense_replace": 1, "n_shared_experts": 2})).llm
    assert (llm.num_moe_layers, llm.shared_intermediate) == (3, 12)
    mixtral = {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert ModelSpec.from_config(config(text=mixtral)).llm.expert_intermediate == 16


def test_sliding_layers() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    llm = ModelSpec.from_config(config(text={"layer_types": types, "sliding_window": 64})).llm
    assert (llm.window_tokens, llm.num_windowed_layers) == (64, 2)
    assert ModelSpec.from_config(config(text={"sliding_window": 64})).llm.num_windowed_layers == 4
    off = {"sliding_window": 64, "use_sliding_window": False}
    assert ModelSpec.from_config(config(text=off)).llm.num_windowed_layers == 0


def test_unknown_connector_is_an_assumption() -> None:
    spec = ModelSpec.from_config(config())
    assert spec.connector == ConnectorSpec(merge=1, linears=((8, 8), (8, 8)))
    assert "two-layer MLP on all patches is assumed" in spec.assumptions[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text_config": TEXT}, r"no vision_config: .* Pass the config of a vision-language model"),
        (config(text={"cross_attention_layers": [1]}), "cross-attention is not covered"),
        (config(text={"kv_lora_rank": 4}), "latent"),
        (config(text={"layer_types": ["linear_attention"] * 4}), "'linear_attention'"),
        (config(vision={"use_rel_pos": True}), "convolutional neck"),
        (config(vision={"patch_size": [14, 16]}), "only square"),
        (config(vision={"hidden_size": None}), "vision config has None for embed_dim / hidden_size"),
        (config(text={"num_experts": [8, 8]}), "unexpected kind"),
        (config(text={"vocab_size": 0}), "vocab is 0"),
    ],
)
def test_refuses(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config(bad)


def test_records_validate() -> None:
    layers = {"hidden": 4, "num_layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 2, "intermediate": 8}
    with pytest.raises(ModelError, match=r"kv_heads is 0; it must be a whole number >= 1"):
        TransformerSpec(**layers | {"kv_heads": 0}, gated_mlp=True)
    with pytest.raises(ModelError, match="num_windowed_layers is 3 of 2 layers"):
        TransformerSpec(**layers, gated_mlp=True, num_windowed_layers=3, window_tokens=4)
    with pytest.raises(ModelError, match="linears is empty"):
        ConnectorSpec(merge=1, linears=())


def test_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert hash(ModelSpec.from_json(spec.to_json())) == hash(spec)
    assert (spec.connector.input_dim, spec.connector.output_dim) == (4, 6)
    data = json.loads(spec.to_json())
    with pytest.raises(ModelError, match="schema version 99"):
        ModelSpec.from_dict(data | {"schema_version": 99})
    with pytest.raises(ModelError, match="not readable"):
        ModelSpec.from_dict(data | {"colour": "red"})
    assert replace(spec, assumptions=("x",)) != spec


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, hf_dflop.cost as c\n"
        f"c.CostModel.analytic(c.ModelSpec.from_config({config()!r})).llm_s([3])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
