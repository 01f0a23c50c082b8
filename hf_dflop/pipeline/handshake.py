"""What ranks tell each other at their first step, once.

In: the first microbatch with images. Out, on every rank: the `FeatureFormat` in which the encoder's own code returns
features (the encoder replica that has the images runs them once without gradients, and tells), and whether the stages
are exact on a small copy of the model (the first LLM stage tries that microbatch, and tells; where the encoder has
several stages, the first of them does, too).

Assumption: the format does not change between microbatches.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist

from hf_dflop.errors import ModelError, PlanError, ShapeMismatchError
from hf_dflop.pipeline.batch import StepBatch
from hf_dflop.pipeline.bridge import Route
from hf_dflop.pipeline.encoder import VisionPart
from hf_dflop.pipeline.features import FeatureFormat, flatten, read_format
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.pipeline.topology import Place, Topology
from hf_dflop.pipeline.wire import Wire

__all__ = ["agree_on_encoder", "agree_on_format", "agree_on_stages", "all_try"]


def agree_on_format(
    batch: StepBatch,
    routes: tuple[Route, ...],
    topology: Topology,
    place: Place,
    wire: Wire,
    vision: RaggedStage | None,
) -> FeatureFormat:
    """All ranks call it; one runs its encoder.

    Raises:
        ShapeMismatchError: the encoder gives another number of rows than the shapes say (on every rank).
    """
    microbatch, replica = next(
        (m, v) for m, route in enumerate(routes) for v, rows in enumerate(route.encoder_rows) if rows
    )
    source = topology.rank(topology.first_llm_stage - 1, replica)
    told: list[dict] = [{}]
    if place.rank in topology.shards(topology.first_llm_stage - 1, replica):
        assert vision is not None
        try:
            told = [_probe(batch, routes[microbatch].encoder_rows[replica], microbatch, wire, vision)]
        except Exception as error:
            told = [{"error": f"{type(error).__name__}: {error}"}]
    dist.broadcast_object_list(told, src=source)
    if "error" in told[0]:
        raise ShapeMismatchError(f"the encoder failed on microbatch {microbatch} (rank {source}): {told[0]['error']}")
    return FeatureFormat.from_dict(told[0])


def _probe(batch: StepBatch, rows: int, microbatch: int, wire: Wire, vision: RaggedStage) -> dict:
    inputs = batch.vision[microbatch]
    if inputs is None:
        raise ShapeMismatchError(f"the shapes announce {rows} rows of image features, but no pixels were given")
    assert isinstance(vision.submod, VisionPart)  # the last of the encoder's, which sees a stand-in for its input
    devices = [wire.device] if wire.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), wire.context():
        output = vision.submod.encode(wire.to_device(inputs))
    form = read_format(output)
    found = flatten(output, form)
    if len(found) != rows:
        raise ShapeMismatchError(
            f"it gives {len(found)} rows of image features; the shape columns say {rows}. Profile the dataset again"
        )
    return form.to_dict()


def agree_on_stages(
    batch: StepBatch,
    topology: Topology,
    place: Place,
    check: Callable[..., None],
    form: FeatureFormat | None,
    *,
    all_shards: bool = False,
) -> None:
    """All ranks call it; one tries the stages on a small copy of the model, or all tensor-parallel ones together.

    Raises:
        ModelError: the stages are not exact (on every rank).
    """
    cells = [
        (replica.num_features == 0, replica.num_tokens, m, d)
        for m, replicas in enumerate(batch.shape.microbatches)
        for d, replica in enumerate(replicas)
        if replica.rows
    ]
    if not cells:
        return
    _, _, microbatch, replica = min(cells)  # the shortest with images
    sources = topology.shards(topology.first_llm_stage, replica)

    def tried() -> None:
        inputs = batch.text[microbatch]
        assert inputs is not None
        check(inputs, batch.shape.microbatches[microbatch][replica].num_features, form)

    _some_try(sources if all_shards else sources[:1], place, tried)


def agree_on_encoder(
    batch: StepBatch,
    routes: tuple[Route, ...],
    topology: Topology,
    place: Place,
    check: Callable[..., None],
    *,
    all_shards: bool = False,
) -> None:
    """All ranks call it; one tries the encoder's stages on a small copy of the model, or all tensor-parallel ones
    together.

    Raises:
        ModelError: the stages are not exact (on every rank).
    """
    cells = [(rows, m, v) for m, route in enumerate(routes) for v, rows in enumerate(route.encoder_rows) if rows]
    _, microbatch, replica = min(cells)  # the one with the fewest rows

    def tried() -> None:
        inputs = batch.vision[microbatch]
        if inputs is None:
            raise ModelError("the shapes announce rows of image features, but no pixels were given.")
        check(inputs)

    sources = topology.shards(0, replica)
    _some_try(sources if all_shards else sources[:1], place, tried)


def all_try(tried: Callable[[], None]) -> None:
    """All ranks call it; what one finds wrong with the model or the plan is raised on all."""
    told: list[Any] = [None] * dist.get_world_size()
    found = None
    try:
        tried()
    except (ModelError, PlanError) as error:
        found = (type(error).__name__, str(error))
    dist.all_gather_object(told, found)
    for kind, message in filter(None, told):
        raise (PlanError if kind == "PlanError" else ModelError)(message)


def _some_try(sources: Collection[int], place: Place, tried: Callable[[], None]) -> None:
    def try_here() -> None:
        if place.rank in sources:
            with torch.random.fork_rng([]):  # building a model draws numbers; a resumed run must not see it
                tried()

    all_try(try_here)
