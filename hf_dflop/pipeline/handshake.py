"""What ranks tell each other at their first step, once.

In: the first microbatch with images, and the first with videos. Out, on every rank: the `FeatureFormat` in which the
encoder's own code returns features (an encoder replica that has them runs them once without gradients, and tells), and
whether the stages are exact on a small copy of the model (the first LLM stage tries that microbatch, and tells; where
the encoder has several stages, the first of them does, too).

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
from hf_dflop.pipeline.kinds import KINDS, Formats, has_videos, kinds_of, sent_width
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.pipeline.topology import Place, Topology
from hf_dflop.pipeline.wire import Wire

__all__ = ["agree_on_encoder", "agree_on_formats", "agree_on_stages", "agree_on_videos", "all_try"]


def agree_on_formats(
    batch: StepBatch,
    routes: tuple[Route, ...],
    topology: Topology,
    place: Place,
    wire: Wire,
    vision: RaggedStage | None,
    known: Formats,
) -> dict[str, FeatureFormat]:
    """The formats of kinds (images, videos) that are not known and come in this call. All ranks call it; for each kind
    one that has it runs its encoder.

    Raises:
        ShapeMismatchError: the encoder gives another number of rows than the shapes say (on every rank).
    """
    found: dict[str, FeatureFormat] = {}
    replicas = topology.replicas(0)
    nowhere = len(routes) * replicas
    first = dict.fromkeys(KINDS, nowhere)
    if place.encodes:
        for microbatch, route in enumerate(routes):
            if route.encoder_rows[place.replica]:
                for kind in kinds_of(batch.vision[microbatch] or {}) or ("image",):
                    first[kind] = min(first[kind], microbatch * replicas + place.replica)
    cells = torch.tensor(list(first.values()), device=wire.device)
    dist.all_reduce(cells, op=dist.ReduceOp.MIN)
    for kind, cell in zip(KINDS, cells.tolist(), strict=True):
        if kind in known or cell == nowhere:
            continue
        microbatch, replica = divmod(cell, replicas)
        source = topology.rank(topology.first_llm_stage - 1, replica)
        told: list[dict] = [{}]
        if place.rank in topology.shards(topology.first_llm_stage - 1, replica):
            assert vision is not None
            try:
                rows = routes[microbatch].encoder_rows[replica]
                told = [_probe(batch, rows, microbatch, wire, vision, kind, {**known, **found})]
            except Exception as error:
                told = [{"error": f"{type(error).__name__}: {error}"}]
        dist.broadcast_object_list(told, src=source)
        if "error" in told[0]:
            raise ShapeMismatchError(
                f"the encoder failed on microbatch {microbatch} (rank {source}): {told[0]['error']}"
            )
        found[kind] = FeatureFormat.from_dict(told[0])
    return found


def _probe(
    batch: StepBatch, rows: int, microbatch: int, wire: Wire, vision: RaggedStage, kind: str, known: Formats
) -> dict:
    inputs = batch.vision[microbatch]
    if inputs is None:
        raise ShapeMismatchError(f"the shapes announce {rows} rows of features, but no pixels were given")
    assert isinstance(vision.submod, VisionPart)  # the last of the encoder's, which sees a stand-in for its input
    devices = [wire.device] if wire.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), wire.context():
        outputs = vision.submod.encode(wire.to_device(inputs))
    found = sum(len(flatten(output, read_format(output))) for output in outputs.values())
    if found != rows:
        raise ShapeMismatchError(
            f"it gives {found} rows of features; the shape columns say {rows}. Profile the dataset again"
        )
    form = read_format(outputs[kind])
    if known and form.sent_width != sent_width(known):
        raise ShapeMismatchError(
            f"a row of {kind} features has {form.sent_width} numbers, others have {sent_width(known)}"
        )
    return form.to_dict()


def agree_on_stages(
    batch: StepBatch,
    topology: Topology,
    place: Place,
    check: Callable[..., None],
    forms: Formats,
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
        check(inputs, batch.shape.microbatches[microbatch][replica].num_features, forms)

    _some_try(sources if all_shards else sources[:1], place, tried)


def agree_on_videos(
    batch: StepBatch, topology: Topology, place: Place, check: Callable[..., None], forms: Formats
) -> None:
    """All ranks call it; those of the first LLM stage that have videos try the stages on their shortest microbatch of
    them.

    Raises:
        ModelError: the stages are not exact (on every rank).
    """
    cells = [
        (batch.shape.microbatches[m][place.replica].num_tokens, m)
        for m, inputs in enumerate(batch.text)
        if inputs is not None and has_videos(inputs)
    ]

    def tried() -> None:
        _, microbatch = min(cells)
        inputs = batch.text[microbatch]
        assert inputs is not None
        check(inputs, batch.shape.microbatches[microbatch][place.replica].num_features, forms)

    own = topology.first_llm_stage in place.stages
    _some_try({place.rank} if own and cells else (), place, tried)


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
