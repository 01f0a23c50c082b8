"""A model without its weights: what writes and reads its checkpoints once the weights lie on many ranks.

In: a model as its user has it: stock, or wrapped by peft. Out: the transformers model in it, which is cut; and a copy
of the given one on the meta device, whose own `save_pretrained` writes weights that were gathered from all ranks, and
which tells what a checkpoint of it holds: of a model with adapters, these alone.

Assumption: peft's wrapper does nothing but to hold the model and its adapters; what does more is refused.
"""

import copy
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_dflop.errors import ModelError
from hf_dflop.pipeline.reading import Unread, read_needed

__all__ = ["Skeleton", "unwrap"]

_PREFIX = "base_model.model."
"""What peft puts before the names of the model in it."""


def unwrap(model: Any) -> Any:
    """The transformers model in `model`, with the adapters that peft put into its layers.

    Raises:
        ModelError: adapters that do more than stand in the model's own layers.
    """
    peft = sys.modules.get("peft")  # a model that is wrapped by it has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ModelError(
                "the model's adapters are transformers' own (add_adapter, or loaded with it); give it wrapped by "
                "peft: get_peft_model, or PeftModel.from_pretrained."
            )
        return model
    from peft.tuners.tuners_utils import BaseTuner

    config = model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    tuner = model.base_model
    if config.is_prompt_learning or not isinstance(tuner, BaseTuner) or type(tuner).forward is not BaseTuner.forward:
        raise ModelError(
            f"adapters of the kind {kind} change what goes into the whole model or comes out of it, and stages would "
            "not see it: use adapters inside layers, such as LoRA."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelError("activated LoRA reads the ids before the model runs: leave alora_invocation_tokens out.")
    base = model.get_base_model()
    inside = {id(parameter) for parameter in base.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            raise ModelError(f"the adapters' {name} is outside the model's layers, and no stage would hold it.")
    return base


class Skeleton:
    """A model on the meta device.

    Args:
        given (`nn.Module`): the model as it was given; it is not changed, and its config is shared.
    """

    def __init__(self, given: Any) -> None:
        base = unwrap(given)
        shared: dict[int, Any] = {id(base.config): base.config}
        generation = getattr(base, "generation_config", None)
        if generation is not None:
            shared[id(generation)] = generation
        for parameter in given.parameters():
            shared[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for buffer in given.buffers():
            shared[id(buffer)] = buffer.detach().to("meta")
        self.model: Any = copy.deepcopy(given, shared)
        self.has_adapters = base is not given

    def _adapter_names(self, adapter: str) -> dict[str, str]:
        """Name in a file of that adapter -> name in the unwrapped model."""
        from peft import get_peft_model_state_dict

        state = self.model.state_dict()
        names = {id(value): name.removeprefix(_PREFIX) for name, value in state.items()}
        saved = get_peft_model_state_dict(self.model, state, adapter_name=adapter)
        return {key: names[id(value)] for key, value in saved.items()}

    def saved_names(self) -> frozenset[str] | None:
        """Names, as the unwrapped model has them, of what a checkpoint holds; `None` for all."""
        if not self.has_adapters:
            return None
        adapters = map(self._adapter_names, self.model.peft_config)
        return frozenset(name for adapter in adapters for name in adapter.values())

    def save(self, folder: str, state: Mapping[str, torch.Tensor], **kwargs: Any) -> None:
        """Write a checkpoint as the given model would.

        Args:
            folder (`str`): it is made.
            state (`Mapping`): values of at least the `saved_names`.
            kwargs: of the model's own `save_pretrained`.
        """
        prefix = _PREFIX if self.has_adapters else ""
        self.model.save_pretrained(
            folder, state_dict={prefix + name: value for name, value in state.items()}, **kwargs
        )

    def load(self, folder: str, dtype: torch.dtype, unread: Unread = ((), ())) -> dict[str, torch.Tensor]:
        """What a checkpoint in `folder` holds, under the names of the unwrapped model.

        Args:
            folder (`str`): written by `save`, or by a stock model of the same kind.
            dtype (`torch.dtype`): to read the weights of a model without adapters in.
            unread (`Unread`, *optional*): what of a model without adapters may stay on the meta device.
        """
        if not self.has_adapters:
            load = partial(type(self.model).from_pretrained, folder, dtype=dtype)
            return dict(read_needed(load, lambda _: unread).state_dict())
        from peft import load_peft_weights

        found: dict[str, torch.Tensor] = {}
        for adapter in self.model.peft_config:
            names = self._adapter_names(adapter)
            weights = load_peft_weights(folder if adapter == "default" else f"{folder}/{adapter}", device="cpu")
            found |= {names[key]: value for key, value in weights.items() if key in names}
        return found
