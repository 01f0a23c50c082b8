"""The parts of a model that are measured, priced and held one by one, and what training does to each.

    vision_fixed   patch embedding, positions, norms of the encoder: what does not repeat with its layers
    vision_layer   one (mean) layer of the encoder
    connector      the matrices between encoder and LLM
    llm_fixed      token embeddings and final norm
    llm_layer      one (mean) layer of the LLM
    llm_head       LM head and loss

A part is *trained*; or *passed*: frozen, but a gradient goes through it to something below; or *frozen*: no gradient
reaches it.
"""

from typing import Literal

from hf_dflop.cost.flops import Trainable
from hf_dflop.errors import ModelError

__all__ = ["MODULE_OF_PART", "PARTS", "PartState", "check_part", "part_states"]

PartState = Literal["trained", "passed", "frozen"]

MODULE_OF_PART = {
    "vision_fixed": "vision",
    "vision_layer": "vision",
    "connector": "connector",
    "llm_fixed": "llm",
    "llm_layer": "llm",
    "llm_head": "llm",
}
PARTS: tuple[str, ...] = tuple(MODULE_OF_PART)


def check_part(part: str) -> str:
    """`part` itself.

    Raises:
        ModelError: not one of `PARTS`.
    """
    if part not in MODULE_OF_PART:
        raise ModelError(f"{part!r} is not a part of a model; the parts are {', '.join(PARTS)}.")
    return part


def part_states(trainable: Trainable | None = None, *, checkpointing: bool = False) -> dict[str, PartState]:
    """What a training step does to each part.

    Args:
        trainable (`Trainable`, defaults to everything): what is trained.
        checkpointing (`bool`, defaults to `False`):
            Activations are recomputed; transformers then makes the embeddings' outputs require gradients, see
            `Trainable.inputs_require_grad`.

    Returns:
        `dict`: a state for each of `PARTS`.

    Example:
        >>> part_states(Trainable(vision=False, llm=False))["llm_layer"]
        'passed'
    """
    train = trainable or Trainable()
    forced = checkpointing if train.inputs_require_grad is None else train.inputs_require_grad
    through_vision = train.vision or forced
    through_connector = through_vision or train.connector
    through_llm = through_connector or train.llm or train.llm_adapters

    def state(trained: bool, passed: bool) -> PartState:
        return "trained" if trained else "passed" if passed else "frozen"

    llm = state(train.llm, through_llm)
    vision = state(train.vision, through_vision)
    return {
        "vision_fixed": vision,
        "vision_layer": vision,
        "connector": state(train.connector, through_connector),
        "llm_fixed": llm,
        "llm_layer": llm,
        "llm_head": llm,
    }
