"""What a Trainer really runs: where its ranks meet, what it trains, whether it recomputes activations."""

from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from hf_dflop.cost import CostModel, ModelSpec, Trainable
from hf_dflop.data.dummies import Dummy
from hf_dflop.data.structure import DENSE, ModelStructure
from hf_dflop.errors import ModelError
from hf_dflop.shapes import Shapes

__all__ = [
    "choose_objective",
    "computes_all_pairs",
    "describe_training",
    "dummy_of",
    "image_parameters",
    "is_image_parameter_trained",
    "is_sharded",
    "spec_of",
]


def choose_objective(trainer: Any) -> str:
    """The balancing objective that fits the places where ranks wait for each other.

    `"stage"` for FSDP and ZeRO-3 (ranks meet in every layer), `"slot"` where they meet after every microbatch (TRL
    trainers gather metrics in `compute_loss`; ZeRO-1/2 and `sync_each_batch` reduce each backward), else `"step"`.
    """
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        return "stage" if plugin is not None and plugin.zero_stage == 3 else "slot"
    if is_sharded(trainer):
        return "stage"
    if any(cls.__module__.partition(".")[0] == "trl" for cls in type(trainer).__mro__):
        return "slot"
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return "slot"
    return "step"


def is_sharded(trainer: Any) -> bool:
    """Whether ranks hold shards of the model: FSDP (by accelerate, or when the model was loaded) or DeepSpeed."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return True
    return any(isinstance(module, FSDPModule) for module in trainer.model_wrapped.modules())


def describe_training(trainer: Any) -> dict[str, Any]:
    """Keyword arguments for `CostModel.analytic`: what is trained, activation checkpointing, kind of attention."""
    model = _plain_model(trainer)
    llm = _llm_parameters(model)
    size = sum(parameter.numel() for parameter in llm.values())
    trained = sum(parameter.numel() for parameter in llm.values() if parameter.requires_grad)
    encoder = _encoder(model)
    in_encoder = {id(parameter) for parameter in encoder.parameters()} if encoder is not None else set()
    hearing = _named_encoder(model, "audio")
    in_encoder |= {id(parameter) for parameter in hearing.parameters()} if hearing is not None else set()
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in llm]
    return {
        "trainable": Trainable(
            vision=any(encoder is None or id(parameter) in in_encoder for parameter in outside),
            connector=any(id(parameter) not in in_encoder for parameter in outside),
            # Low-rank adapters are a small share of the LLM that they sit in.
            llm=2 * trained > size,
            llm_adapters=0 < 2 * trained <= size,
        ),
        "checkpointing": bool(trainer.args.gradient_checkpointing),
        # A padded or joined microbatch has a mask, under which dense attention computes the upper half, too.
        "causal_factor": 1.0 if computes_all_pairs(trainer) else 0.5,
    }


def spec_of(trainer: Any, cost_model: CostModel | None) -> ModelSpec:
    """The structure of the model; of one whose config is not covered, what the given cost model was built for.

    Raises:
        ModelError: it is not covered, and there is no cost model.
    """
    try:
        return ModelSpec.from_config(trainer.accelerator.unwrap_model(trainer.model).config)
    except ModelError:
        if cost_model is None:
            raise
        return cost_model.spec


def computes_all_pairs(trainer: Any) -> bool:
    """Whether the LLM's attention computes everything under its mask (SDPA, eager), or skips what is masked."""
    return ModelStructure.of(_plain_model(trainer)).attention in DENSE


def dummy_of(cost_model: CostModel, shapes: Shapes, tokens: int) -> Dummy | None:
    """What a dummy row of so many tokens costs; its patches as those of the dataset's images, by token.

    Args:
        cost_model ([`CostModel`]): shapes → seconds.
        shapes ([`Shapes`]): of the dataset.
        tokens (`int`): LLM positions of the row; 0 for no such row.
    """
    if not tokens or not int(shapes.image_tokens.sum()):
        return None
    patches = -(-tokens * int(shapes.image_patches.sum()) // int(shapes.image_tokens.sum()))
    counts = {"num_images": 1, "image_tiles": 1, "image_patches": patches, "image_patches_sq": patches**2}
    row = Shapes(
        **{name: np.array([count]) for name, count in counts.items()},
        image_tokens=np.array([tokens]),
        text_tokens=np.array([0]),
        label_tokens=np.array([0]),
    )
    vision_s, llm_s = cost_model.sample_seconds(row)[0]
    return Dummy(vision_s=float(vision_s), llm_s=float(llm_s), tokens=tokens, patches=patches)


def is_image_parameter_trained(trainer: Any) -> bool:
    """Whether anything outside the LLM (encoder, connector) is trained."""
    return bool(image_parameters(trainer))


def image_parameters(trainer: Any) -> list[torch.nn.Parameter]:
    """The trained parameters outside the LLM: encoder and connector."""
    model = _plain_model(trainer)
    llm = _llm_parameters(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in llm]


def _plain_model(trainer: Any) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _llm_parameters(model: Any) -> dict[int, torch.nn.Parameter]:
    """The parameters of the decoder, the token embedding and the LM head, by identity."""
    modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return {id(p): p for module in modules if module is not None for p in module.parameters()}


def _named_encoder(model: Any, modality: str) -> Any | None:
    """What transformers names the encoder of images or of sounds; `None` where it names none."""
    if not hasattr(model, "get_encoder"):
        return None
    try:
        encoder = model.get_encoder(modality=modality)
    except (TypeError, AttributeError, ValueError):
        return None
    return None if encoder is model or encoder is getattr(model, "model", None) else encoder


def _encoder(model: Any) -> Any | None:
    """The encoder: what transformers names it, else the child that holds most of what is not the LLM."""
    if (encoder := _named_encoder(model, "image")) is not None:
        return encoder
    llm = _llm_parameters(model)
    base = getattr(model, "model", model)
    sizes = {
        name: sum(p.numel() for p in child.parameters() if id(p) not in llm) for name, child in base.named_children()
    }
    name = max(sizes, key=lambda key: sizes[key], default=None)
    return getattr(base, name) if name is not None and sizes[name] else None
