"""How many layers each stage of a pipeline gets, when its ends carry more than layers.

In: a number of layers and what the first and the last stage do beside them, in layers. Out: layers of each stage, such
that the stage with the most work has as little as possible.
"""

import heapq

from hf_dflop.errors import PlanError

__all__ = ["split_layers"]


def split_layers(
    num_layers: int, num_stages: int, *, first_extra: float = 0.0, last_extra: float = 0.0, at_least: int = 1
) -> tuple[int, ...]:
    """Layers of each stage.

    Layers go one by one to the stage with the least work (of equals, to the later one, which holds fewer
    microbatches), which is optimal for equal layers: any other split has a stage with as much.

    Args:
        num_layers (`int`): layers in all.
        num_stages (`int`): stages.
        first_extra, last_extra (`float`): other work of the first and the last stage, in layers.
        at_least (`int`): layers that each stage gets whatever it carries.

    Raises:
        PlanError: fewer layers than stages need.

    Example:
        >>> split_layers(10, 3, last_extra=2.0)  # an LM head worth two layers
        (4, 4, 2)
    """
    if num_layers < num_stages * at_least:
        raise PlanError(f"{num_layers} layers cannot fill {num_stages} stages with {at_least} each; use fewer stages.")
    layers = [at_least] * num_stages
    extra = [0.0] * num_stages
    extra[0] += first_extra
    extra[-1] += last_extra
    heap = [(layers[s] + extra[s], -s) for s in range(num_stages)]
    heapq.heapify(heap)
    for _ in range(num_layers - num_stages * at_least):
        work, place = heap[0]
        layers[-place] += 1
        heapq.heapreplace(heap, (work + 1, place))
    return tuple(layers)
