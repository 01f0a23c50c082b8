"""What of a model decides how samples can share a row: how positions count, and who may attend to whom.

Read from the model's class and config, never from its name:

    get_rope_index              on some module: positions of several dimensions, computed from the image grids
    create_masks_for_generate   on the model class: a mask rule of its own, which position ids do not express

Both are called one sample at a time, so what they answer is true of the sample alone, whatever the rule.

Assumption: a model that takes positions of k dimensions takes `1 + k` rows too, the first being the position in the
sample, as transformers does for joined samples. `check_packing` shows whether it does.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from hf_dflop.errors import ModelError

__all__ = ["DENSE", "ModelStructure", "unwrapped"]

_RESERVED = ("_token_id", "_token_index")
DENSE = ("sdpa", "eager")
"""Attention that takes a mask with one entry per pair of tokens."""


class ModelStructure:
    """The class and the config of a model, and a copy of it without weights. Can be pickled to loader workers."""

    def __init__(self, model_class: type, config: Any) -> None:
        self.model_class = model_class
        self.config = config
        self._skeleton: Any = None

    @classmethod
    def of(cls, model: Any) -> "ModelStructure":
        """From a model (also one that holds LoRA adapters, or is wrapped) or from its config.

        Raises:
            ModelError: neither a model nor the config of a vision-language model.
        """
        from transformers import AutoModelForImageTextToText, PreTrainedConfig

        if isinstance(model, PreTrainedConfig):
            mapping = AutoModelForImageTextToText._model_mapping
            if type(model) not in mapping:
                raise ModelError(
                    f"{type(model).__name__} is not the config of an image-text-to-text model; give a model"
                )
            return cls(mapping[type(model)], model)
        model = unwrapped(model)
        return cls(type(model), model.config)

    @property
    def attention(self) -> str:
        """The attention implementation of the LLM; unset in a config that no model was built from: SDPA."""
        return self.config.get_text_config()._attn_implementation or "sdpa"

    @property
    def has_mask_rule(self) -> bool:
        """Whether who may attend to whom is the model class's own matter."""
        return hasattr(self.model_class, "create_masks_for_generate")

    @property
    def image_marks(self) -> list[int]:
        """Token ids that the model's config reserves (image, video, begin of image, ...)."""
        reserved = {name: value for name, value in vars(self.config).items() if name.endswith(_RESERVED)}
        return sorted({value for value in reserved.values() if isinstance(value, int)})

    @property
    def has_grid(self) -> bool:
        """Whether positions have several dimensions."""
        return self._owner_of("get_rope_index") is not None

    def grid_positions(self, padded: Mapping[str, Any]) -> Any | None:
        """Positions `(k, rows, length)` by the model's own rule; `None` where positions just count tokens."""
        import torch

        owner = self._owner_of("get_rope_index")
        if owner is None:
            return None
        parameters = inspect.signature(owner.get_rope_index).parameters
        given = {name: padded[name] for name in parameters if name in padded}
        if "mm_token_type_ids" in parameters and "mm_token_type_ids" not in given:
            given["mm_token_type_ids"] = torch.zeros_like(padded["input_ids"])
        positions = owner.get_rope_index(**given)[0]
        return positions

    def attention_mask(self, samples: Sequence[Mapping[str, Any]]) -> Any | None:
        """Block-diagonal mask `(1, 1, tokens, tokens)`, or a dict of them by kind of layer.

        Args:
            samples (`Sequence[Mapping]`): the text keys of each sample, of shape `(tokens,)`.

        Returns:
            `None` where transformers builds the mask from position ids: the model has no rule of its own, or its
            attention takes no dense mask.
        """
        import torch

        rule = getattr(self.model_class, "create_masks_for_generate", None)
        if rule is None or self.attention not in DENSE:
            return None
        dtype = getattr(self.config, "dtype", None) or torch.float32
        masks = []
        for sample in samples:
            columns = {key: value[None] for key, value in sample.items() if key not in ("input_ids", "labels")}
            length = len(sample["input_ids"])
            masks.append(
                rule(
                    # The first five by place: the fourth, the cache, has gone by two names.
                    self.config,
                    torch.empty(1, length, 0, dtype=dtype),  # only its shape and dtype are read
                    None,
                    None,
                    torch.arange(length)[None],
                    is_first_iteration=True,
                    **columns,
                )
            )
        lengths = [len(sample["input_ids"]) for sample in samples]
        if isinstance(masks[0], dict):
            return {kind: _block_diagonal([mask[kind] for mask in masks], lengths) for kind in masks[0]}
        return _block_diagonal(masks, lengths)

    def _owner_of(self, method: str) -> Any | None:
        """The module of the model that has a method, without weights."""
        import torch

        if self._skeleton is None:
            with torch.device("meta"):
                self._skeleton = self.model_class(copy.deepcopy(self.config))
        return next((module for module in self._skeleton.modules() if hasattr(type(module), method)), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"model_class": self.model_class, "config": self.config, "_skeleton": None}


def unwrapped(model: Any) -> Any:
    """The transformers model under adapters and wrappers.

    Raises:
        ModelError: there is none.
    """
    from transformers import PreTrainedModel

    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if inner is None:
            raise ModelError(f"{type(model).__name__} is neither a transformers model nor a config of one")
        model = inner
    return model


def _block_diagonal(masks: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Masks `(1, 1, n, n)` of samples (`None`: plain causal) → one mask in which no sample sees another."""
    import torch

    dtype = next((mask.dtype for mask in masks if mask is not None), torch.bool)
    never = False if dtype == torch.bool else torch.finfo(dtype).min
    joined = torch.full((1, 1, sum(lengths), sum(lengths)), never, dtype=dtype)
    start = 0
    for mask, length in zip(masks, lengths, strict=True):
        block = joined[:, :, start : start + length, start : start + length]
        if mask is None:
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            block[:] = causal if dtype == torch.bool else torch.zeros(length, length).masked_fill(~causal, never)
        else:
            block[:] = mask
        start += length
    return joined
