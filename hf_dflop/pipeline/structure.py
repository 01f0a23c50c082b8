"""Where a vision-language model can be cut, read from its module tree.

In: a transformers model. Out: its body, its decoder, the decoder's layers, what comes before and after them, the head.

    top (…ForConditionalGeneration)   everything but the body: the head, with the last LLM stage
    └── body (base_model)             everything but the decoder: encoder, connector, newline embeddings: stage 0
        └── decoder (get_decoder)     children before `layers`: first LLM stage; after: last LLM stage

Assumptions: the decoder is a part of the body, its layers stand in one `ModuleList` as long as
`num_hidden_layers`, and its children are registered in the order in which they run. The start-up check tries it out.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError
from hf_dflop.pipeline._compat import encoder_inputs, takes_features
from hf_dflop.pipeline.encoder import EncoderStack

__all__ = ["Structure", "read_structure"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Qualified names of the parts of a model."""

    body: str
    decoder: str
    layers: str
    num_layers: int
    hidden_size: int
    before: tuple[str, ...]
    """Children of the decoder that run before its layers; the token embedding is the first of them."""
    embedding: str
    after: tuple[str, ...]
    """Children of the decoder that run after its layers."""
    head: tuple[str, ...]
    """Children of the top that are not the body."""
    encoder: tuple[str, ...]
    """Children of the body, or of a module between it and the decoder, that do not hold the decoder."""
    tower: str | None
    """The vision encoder alone, without the connector, where the model tells."""
    vision_keys: tuple[str, ...]
    """Inputs of `get_image_features`."""
    video_keys: tuple[str, ...]
    """Inputs of `get_video_features`; empty where there is none."""
    tied: bool
    """The head's weight is the token embedding."""
    stack: EncoderStack | None = None
    """Parts of the encoder, where it is to be cut."""

    @property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Inputs of the methods for features, by kind."""
        return {"image": self.vision_keys, "video": self.video_keys}

    @property
    def between(self) -> tuple[str, ...]:
        """Modules whose own parameters (a newline embedding) belong to the encoder: the body, on to the decoder."""
        names, at = [self.body], self.body
        for step in self.decoder[len(self.body) + 1 :].split(".")[:-1]:
            at = f"{at}.{step}"
            names.append(at)
        return tuple(names)


def read_structure(model: nn.Module) -> Structure:
    """The parts of `model`.

    Raises:
        ModelError: it has no image encoder, or no decoder with a list of layers where it is looked for.
    """
    names = {id(module): name for name, module in model.named_modules()}
    body = model.base_model
    if body is model or id(body) not in names:
        raise ModelError(f"{type(model).__name__} has no body under its head; give the model with its LM head.")
    if not hasattr(body, "get_image_features"):
        raise ModelError(
            f"{type(body).__name__} has no get_image_features, by which its encoder is run; it is not a "
            "vision-language model, or your transformers is too old."
        )
    if not takes_features(body):
        raise ModelError(
            f"{type(body).__name__} takes neither mm_encoder_outputs nor pixel_values, by which features from another "
            "rank enter it; upgrade transformers, or use a plan without a pipeline."
        )
    decoder = body.get_decoder()
    body_name, decoder_name = names[id(body)], names.get(id(decoder), "")
    if decoder is body or not decoder_name.startswith(body_name + "."):
        raise ModelError(f"the decoder of {type(model).__name__} is not a part of {body_name!r}: it cannot be cut.")
    text_config = model.config.get_text_config()
    num_layers = text_config.num_hidden_layers
    lists = [
        name
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(lists) != 1:
        raise ModelError(
            f"{type(decoder).__name__} has {len(lists)} lists of {num_layers} modules ({', '.join(lists) or 'none'}); "
            "exactly one is needed, to cut it into stages."
        )
    embedding = names.get(id(body.get_input_embeddings()))
    if embedding is None or not embedding.startswith(decoder_name + "."):
        raise ModelError(f"the token embedding of {type(model).__name__} is not in its decoder: it cannot be cut.")
    children = [name for name, _ in decoder.named_children()]
    at = children.index(lists[0])
    weightless = {name for name, child in decoder.named_children() if next(child.parameters(), None) is None}
    head = model.get_output_embeddings()
    tower = model.get_encoder("image") if hasattr(model, "get_encoder") else None
    return Structure(
        body=body_name,
        decoder=decoder_name,
        layers=f"{decoder_name}.{lists[0]}",
        num_layers=num_layers,
        hidden_size=int(text_config.hidden_size),
        before=tuple(f"{decoder_name}.{name}" for name in children[:at] if name not in weightless),
        embedding=embedding,
        after=tuple(f"{decoder_name}.{name}" for name in children[at + 1 :] if name not in weightless),
        head=tuple(name for name, _ in model.named_children() if name != body_name.split(".")[0]),
        encoder=_encoder(model, body_name, decoder_name),
        tower=None if tower is None or tower is model else names.get(id(tower)),
        vision_keys=encoder_inputs(body),
        video_keys=_inputs(body.get_video_features) if hasattr(body, "get_video_features") else (),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )


def _encoder(model: nn.Module, body: str, decoder: str) -> tuple[str, ...]:
    found, at = [], body
    for step in decoder[len(body) + 1 :].split("."):
        found += [f"{at}.{name}" for name, _ in model.get_submodule(at).named_children() if name != step]
        at = f"{at}.{step}"
    return tuple(found)


def _inputs(function: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds and not p.name.startswith("vision_feature"))


def has_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def first_device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
