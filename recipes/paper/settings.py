"""The models, clusters and claims of the paper's evaluation.

Dimensions are those of the public configs, as plain dicts: nothing is downloaded. Sizes that the public summaries of
the paper leave open (GPUs of each model, samples of a step) are ours and marked so in the README.
"""

from dataclasses import dataclass
from typing import Any

from hf_dflop.plan.cluster import Cluster

__all__ = ["SAMPLES_PER_GPU", "SCALING", "SETTINGS", "Setting", "a100_cluster"]

SIGLIP_400M: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 384, "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
VIT_6B: dict[str, Any] = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25,
    "patch_size": 14, "image_size": 448, "use_mask_token": False, "hidden_act": "gelu",
}  # fmt: skip


def _llm(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab, "hidden_act": "silu",
    }  # fmt: skip


QWEN25_7B = _llm(3584, 28, 28, 4, 18944, 152064)
QWEN25_32B = _llm(5120, 64, 40, 8, 27648, 152064)
QWEN25_72B = _llm(8192, 80, 64, 8, 29568, 152064)
LLAMA3_8B = _llm(4096, 32, 32, 8, 14336, 128256)
LLAMA3_70B = _llm(8192, 80, 64, 8, 28672, 128256)


def _onevision(llm: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": SIGLIP_400M, "text_config": llm, "projector_hidden_act": "gelu",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }  # fmt: skip


def _internvl(llm: dict[str, Any]) -> dict[str, Any]:
    return {"vision_config": VIT_6B, "text_config": llm, "downsample_ratio": 0.5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One model of the evaluation."""

    name: str
    config: dict[str, Any]
    num_gpus: int
    """Ours, within the 8 to 64 of the paper: it grows with the model."""
    mix: str
    claims: str
    """Speed-ups over Megatron-LM in the public summaries of the paper, which conflict with each other."""


SETTINGS: tuple[Setting, ...] = (
    Setting(name="ov-qwen2.5-7b", config=_onevision(QWEN25_7B), num_gpus=16, mix="onevision", claims="1.2 / 1.3"),
    Setting(name="ov-llama3-8b", config=_onevision(LLAMA3_8B), num_gpus=16, mix="onevision", claims="2.3"),
    Setting(name="ov-qwen2.5-32b", config=_onevision(QWEN25_32B), num_gpus=32, mix="onevision", claims="2.3 / 2.7"),
    Setting(name="ov-llama3-70b", config=_onevision(LLAMA3_70B), num_gpus=64, mix="onevision", claims="not told"),
    Setting(name="ov-qwen2.5-72b", config=_onevision(QWEN25_72B), num_gpus=64, mix="onevision", claims="3.6"),
    Setting(name="internvl2.5-72b", config=_internvl(QWEN25_72B), num_gpus=64, mix="internvl", claims="3.1 / 3.6"),
)
VIT_6B_7B = Setting(name="vit-6b-qwen2.5-7b", config=_internvl(QWEN25_7B), num_gpus=8, mix="internvl", claims="none")
SCALING: tuple[Setting, ...] = (*SETTINGS, VIT_6B_7B)

SAMPLES_PER_GPU = 8
"""Samples of a step for each GPU: ours."""


def a100_cluster(num_gpus: int) -> Cluster:
    """Nodes of 8 A100-80GB with 800 Gb/s of InfiniBand for each node, shared by its GPUs."""
    return Cluster(
        nodes=max(1, num_gpus // 8), gpus_per_node=min(8, num_gpus), gpu="A100-80GB", inter_bytes_per_s=12.5e9
    )
