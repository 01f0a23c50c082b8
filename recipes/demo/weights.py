"""Reads the two sets of real weights, keeping the first layers and the first tokens of each.

In: the ONNX file of a DINOv2-shaped ViT-S/14 and the GGUF file of SmolLM2-135M-Instruct. Out: state dicts in the
names of transformers' `Dinov2Model` and `LlamaForCausalLM`, and the tokenizer.

Assumptions: the exporter's node names tell which parameter a transposed constant is; the vocabulary is ordered by
merge rank, so its first N tokens are themselves a complete byte-level BPE with the same embeddings (longer words
come out as more tokens). The language model was stored in 4 bits: its weights are those values, not the original's.
"""

import json
import logging
import re
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["first_tokens", "read_language_model", "read_tokenizer", "read_vision_tower"]

_MATMUL = re.compile(r"^/backbone/encoder/(layer\.\d+)/(attention/attention/|attention/output/|mlp/)(\w+)/MatMul$")
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def read_vision_tower(path: Path, *, num_layers: int, num_patches_per_side: int) -> dict[str, Tensor]:
    """State dict of a `Dinov2Model` with the first `num_layers` layers and its positions for a smaller image.

    The position embedding, 37 x 37 in the file, is resized once as transformers would at every call.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in arrays.items()
        if name.startswith("backbone.") and not name.endswith(("cls_token", "mask_token"))
    }
    for node in graph.node:
        match = _MATMUL.match(node.name)
        if match and node.input[1] in arrays:  # the exporter folded weight.T into a constant
            name = f"encoder.{match[1]}.{match[2]}{match[3]}.weight".replace("/", ".")
            state[name] = arrays[node.input[1]].T.contiguous()
    state = {_rename(name): value for name, value in state.items() if _layer(name) < num_layers}
    class_position = next(v for k, v in arrays.items() if k.startswith("onnx::Concat") and v.dim() == 3)
    positions = next(v for k, v in arrays.items() if k.startswith("onnx::Reshape") and v.dim() == 3)
    side = round(positions.shape[1] ** 0.5)
    grid = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    size = (num_patches_per_side, num_patches_per_side)
    resized = torch.nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    state["embeddings.cls_token"] = arrays["backbone.embeddings.cls_token"]
    state["embeddings.position_embeddings"] = torch.cat(
        [class_position, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1
    )
    return state


def read_language_model(path: Path, *, num_layers: int, vocab_size: int) -> tuple[dict, dict[str, Tensor]]:
    """(config fields, state dict) of a `LlamaForCausalLM` with the first layers and the first tokens' embeddings."""
    from transformers import AutoModelForCausalLM

    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns about the quantized file
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    logging.getLogger("transformers").setLevel(level)
    config = model.config.to_dict()
    if not 1 <= num_layers <= config["num_hidden_layers"]:
        raise ValueError(f"llm_layers is {num_layers}; the model has {config['num_hidden_layers']}")
    state = {name: value for name, value in model.state_dict().items() if _layer(name) < num_layers}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:vocab_size].clone()
    state.pop("lm_head.weight", None)  # tied to the embedding
    for name in ("quantization_config", "_name_or_path", "architectures", "transformers_version", "dtype"):
        config.pop(name, None)
    config.update(num_hidden_layers=num_layers, vocab_size=vocab_size, tie_word_embeddings=True)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:num_layers]
    return config, state


def read_tokenizer(path: Path):  # type: ignore[no-untyped-def]
    """The tokenizer inside the GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def first_tokens(tokenizer_json: str, vocab_size: int) -> str:
    """A byte-level BPE `tokenizer.json` with only its first `vocab_size` tokens and the merges that make them.

    Raises:
        ValueError: a merge would make a token that is kept out of parts that are not, so that the vocabulary is not
            in the order of its merges.
    """
    content = json.loads(tokenizer_json)
    model = content["model"]
    vocab = {token: i for token, i in model["vocab"].items() if i < vocab_size}
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right in vocab:
            if left not in vocab or right not in vocab:
                raise ValueError(
                    f"token {left + right!r} is among the first {vocab_size}, its parts {left!r} and {right!r} are "
                    "not: this vocabulary cannot be cut. Use vocab_size=None."
                )
            merges.append([left, right])
    content["model"] = {**model, "vocab": vocab, "merges": merges}
    return json.dumps(content)


def _layer(name: str) -> int:
    match = re.search(r"\blayers?\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _rename(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
