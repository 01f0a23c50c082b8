"""Reads fields of a Hugging Face config that may be an object or a dict, under their usual synonyms."""

from collections.abc import Mapping
from typing import Any

from hf_dflop.errors import ModelError

__all__ = ["get", "is_merger_gated", "size", "square"]


def get(config: Any, *names: str, default: Any = None) -> Any:
    """First of `names` that the config has and that is not None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return default


def size(config: Any, names: tuple[str, ...], what: str) -> int:
    value = get(config, *names)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(
            f"the {what} config has {value!r} for {' / '.join(names)}; a whole number is needed. "
            "Build the spec by hand: ModelSpec(vision=TransformerSpec(...), ...)."
        )
    return value


def square(value: Any, what: str) -> int:
    sides = [int(side) for side in value] if isinstance(value, list | tuple) else [int(value)]
    if len(set(sides)) != 1:
        raise ModelError(f"{what} is {value}; only square patches and images are covered. Set the spec by hand.")
    return sides[0]


def is_merger_gated(vision_config: Any) -> bool:
    """GLM-V's encoder: RMSNorm, a learned downsampling, and a gated merger as wide as the config's MLP."""
    return all(get(vision_config, name) for name in ("out_hidden_size", "rms_norm_eps", "image_size"))
