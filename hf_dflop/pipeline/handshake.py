"""What ranks learn of features and stages before they run them, once for each kind: images, videos.

In: the first microbatches of a kind. Out, on every rank that needs it: the `FeatureFormat` in which the encoder's own
code returns features of that kind, and that the stages are exact on a small copy of the model.

At the first call with features all ranks take part, and all hear what was found wrong. What comes for the first time
later (a video at step 5) is known to those alone that work on it: encoder replicas that have it run it once without
gradients and leave the format on a board, where LLM ranks read it when they meet its first placeholders. Each of them
tries its stages by itself. So no step communicates to ask whether something new has come.

Assumptions: the format does not change between microbatches; text inputs are on the CPU, as loaders give them.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from hf_dflop.errors import ModelError, PlanError, ShapeMismatchError
from hf_dflop.pipeline.batch import StepBatch
from hf_dflop.pipeline.board import Board
from hf_dflop.pipeline.bridge import Route
from hf_dflop.pipeline.encoder import VisionPart
from hf_dflop.pipeline.features import FeatureFormat, flatten, read_format
from hf_dflop.pipeline.kinds import (
    KINDS,
    has_videos,
    kinds_of,
    placeholder_kinds,
    refuse_sounds,
    sent_width,
    takes_videos,
)
from hf_dflop.pipeline.split import LlmPart
from hf_dflop.pipeline.topology import Place, Topology
from hf_dflop.pipeline.wire import Wire

__all__ = ["Checks", "Handshake", "all_try"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """Trials on a small copy of the model, where they are needed; they raise `ModelError`."""

    encoder: Callable[[Mapping[str, Any]], None] | None = None
    """The encoder's stages, on the encoder's inputs of a microbatch."""
    encoder_shards: Callable[[Mapping[str, Any]], None] | None = None
    """Its tensor-parallel ranks, all of which call it."""
    stages: Callable[..., None] | None = None
    """The LLM's stages: text inputs of a microbatch, its rows of features, formats by kind."""
    stage_shards: Callable[..., None] | None = None
    """The LLM's tensor-parallel ranks, all of which call it; with the same arguments."""


class Handshake:
    """What one rank has learnt.

    Args:
        name (`str`): the model's class, for messages.
        topology (`Topology`), place (`Place`), wire (`Wire`): of the pipeline.
        parts (`Mapping`): stage -> module, of this rank.
        body (`str`): qualified name of the model's body in it.
        checks (`Checks`): what is tried.
    """

    def __init__(
        self,
        name: str,
        topology: Topology,
        place: Place,
        wire: Wire,
        parts: Mapping[int, VisionPart | LlmPart],
        body: str,
        checks: Checks,
    ) -> None:
        self._name, self._topology, self._place, self._wire, self._checks = name, topology, place, wire, checks
        self._encoder = next((part for part in parts.values() if isinstance(part, VisionPart)), None)
        self._body = next(iter(parts.values())).model.get_submodule(body)
        self._takes_videos = takes_videos(self._body)
        self._board: Board | None = None
        self._met: set[str] = set()
        self._tried: set[bool] = set()
        self.forms: dict[str, FeatureFormat] = {}
        """Kind -> format, of the kinds that this rank works on, and of all that came in the first call with any."""

    def meet(self, batch: StepBatch, routes: tuple[Route, ...]) -> None:
        """All ranks call it before a call's microbatches run.

        Raises:
            ModelError: the model cannot run what came, or its stages are not exact.
            ShapeMismatchError: the encoder gives another number of rows than the shapes say.
        """
        has_features = any(any(route.encoder_rows) for route in routes)
        first = has_features and not self.forms
        if first:
            all_try(partial(self._refuse, batch))
            self._board = self._board or Board()
            self._meet_together(batch, routes)
        else:
            self._refuse(batch)
            if self.forms and self._takes_videos and len(self._met) < len(KINDS):
                self._meet_alone(batch, routes)
        if has_features not in self._tried and True not in self._tried:
            self._tried.add(has_features)
            self._try_stages_together(batch)

    # The first call with features -----------------------------------------------------------------------------------

    def _meet_together(self, batch: StepBatch, routes: tuple[Route, ...]) -> None:
        encoders = self._topology.first_llm_stage
        for kind, (microbatch, replica) in self._smallest_anywhere(batch, routes).items():
            inputs = batch.vision[microbatch] if self._place.encodes else None
            if self._checks.encoder is not None:
                one = self._topology.rank(0, replica)
                self._some_try((one,), partial(self._try_encoder, self._checks.encoder, inputs))
            if self._checks.encoder_shards is not None:
                shards = self._topology.shards(0, replica)
                self._some_try(shards, partial(self._try_encoder, self._checks.encoder_shards, inputs))
            source = self._topology.rank(encoders - 1, replica)
            told: list[dict[str, Any]] = [{}]
            if self._place.rank in self._topology.shards(encoders - 1, replica):
                try:
                    told = [self._probe(inputs, routes[microbatch].encoder_rows[replica], kind)]
                except Exception as error:
                    told = [_failure(error, microbatch, source)]
            dist.broadcast_object_list(told, src=source)
            self.forms[kind] = _format_of(told[0])
            self._met.add(kind)

    def _smallest_anywhere(self, batch: StepBatch, routes: tuple[Route, ...]) -> dict[str, tuple[int, int]]:
        """Kind -> microbatch, encoder replica: that with the fewest rows of features among those with the kind."""
        replicas = self._topology.replicas(0)
        cells, nowhere = len(routes) * replicas, torch.iinfo(torch.int64).max
        found = dict.fromkeys(KINDS, nowhere)
        if self._place.encodes:
            replica = self._place.replica
            for microbatch, route in enumerate(routes):
                rows = route.encoder_rows[replica]
                if rows:  # without pixels it is told when they are looked at
                    for kind in kinds_of(batch.vision[microbatch] or {}) or ("image",):
                        found[kind] = min(found[kind], rows * cells + microbatch * replicas + replica)
        told = torch.tensor(list(found.values()), device=self._wire.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return {
            kind: divmod(cell % cells, replicas)
            for kind, cell in zip(KINDS, told.tolist(), strict=True)
            if cell < nowhere
        }

    def _try_stages_together(self, batch: StepBatch) -> None:
        cells = [
            (replica.num_features == 0, replica.num_tokens, m, d)
            for m, replicas in enumerate(batch.shape.microbatches)
            for d, replica in enumerate(replicas)
            if replica.rows
        ]
        if not cells:
            return
        _, _, microbatch, replica = min(cells)  # the shortest with features
        sources = self._topology.shards(self._topology.first_llm_stage, replica)
        if self._checks.stages is not None:
            self._some_try(sources[:1], partial(self._try_stages, self._checks.stages, batch, microbatch))
        if self._checks.stage_shards is not None:
            self._some_try(sources, partial(self._try_stages, self._checks.stage_shards, batch, microbatch))
        if self._checks.stages is not None and "video" in self._met:
            all_try(partial(self._try_placeholders, batch, ("video",)))

    # Later ----------------------------------------------------------------------------------------------------------

    def _meet_alone(self, batch: StepBatch, routes: tuple[Route, ...]) -> None:
        new = [kind for kind in KINDS if kind not in self._met]
        if self._encoder is not None:
            for kind in new:
                rows = [
                    (routes[m].encoder_rows[self._place.replica], m)
                    for m, inputs in enumerate(batch.vision)
                    if kind in kinds_of(inputs or {})
                ]
                if rows:
                    self._meet_pixels(kind, batch, *min(rows))
        self._try_placeholders(batch, new)

    def _meet_pixels(self, kind: str, batch: StepBatch, rows: int, microbatch: int) -> None:
        assert self._encoder is not None
        assert self._board is not None
        inputs = batch.vision[microbatch]
        try:
            if self._encoder.first:
                self._try_encoder(self._checks.encoder, inputs)
                self._try_encoder(self._checks.encoder_shards, inputs)
            told = self._probe(inputs, rows, kind) if self._encoder.last else None
        except Exception as error:
            self._board.tell(kind, _failure(error, microbatch, self._place.rank))
            raise
        self._met.add(kind)
        if told is not None:
            self.forms[kind] = _format_of(told)
            self._board.tell(kind, told)

    def _try_placeholders(self, batch: StepBatch, kinds: Iterable[str]) -> None:
        """Learn the kinds whose placeholders this rank's first LLM stage has, and try the stages on the shortest
        microbatch of each."""
        if self._topology.first_llm_stage not in self._place.stages:
            return
        shapes = [replicas[self._place.replica] for replicas in batch.shape.microbatches]
        shortest: dict[str, tuple[int, int]] = {}
        for microbatch, inputs in enumerate(batch.text):
            for kind in () if inputs is None else placeholder_kinds(self._body, inputs):
                cell = shapes[microbatch].num_tokens, microbatch
                shortest[kind] = min(shortest.get(kind, cell), cell)
        for kind in kinds:
            if kind in shortest:
                self._read(kind)
                self._try_stages(self._checks.stages, batch, shortest[kind][1])

    def _read(self, kind: str) -> None:
        assert self._board is not None
        self._met.add(kind)
        if kind in self.forms:
            return
        try:
            told = self._board.read(kind)
        except RuntimeError as error:
            raise ShapeMismatchError(
                f"input_ids has placeholders of a {kind}, and no rank of the encoder was given one: text and pixels "
                "are not of the same samples"
            ) from error
        self.forms[kind] = _format_of(told)

    # One rank -------------------------------------------------------------------------------------------------------

    def _refuse(self, batch: StepBatch) -> None:
        given = (*batch.text, *batch.vision)
        refuse_sounds(given, self._name)
        if not self._takes_videos and any(has_videos(inputs or {}) for inputs in given):
            raise ModelError(
                f"a microbatch holds videos, and the body of {self._name} has no get_video_features, no "
                "get_placeholder_mask that tells where they belong, or takes no mm_encoder_outputs (transformers >= "
                "5.18): drop videos, or use DDP."
            )

    def _probe(self, inputs: Mapping[str, Any] | None, rows: int, kind: str) -> dict[str, Any]:
        """The format of a kind, from a run of the encoder."""
        if inputs is None:
            raise ShapeMismatchError(f"the shapes announce {rows} rows of features, but no pixels were given")
        assert self._encoder is not None  # the last stage of it, which sees a stand-in for its input
        devices = [self._wire.device] if self._wire.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self._wire.context():
            outputs = self._encoder.encode(self._wire.to_device(inputs))
        found = sum(len(flatten(output, read_format(output))) for output in outputs.values())
        if found != rows:
            raise ShapeMismatchError(
                f"it gives {found} rows of features; the shape columns say {rows}. Profile the dataset again"
            )
        form = read_format(outputs[kind])
        if self.forms and form.sent_width != sent_width(self.forms):
            raise ShapeMismatchError(
                f"a row of {kind} features has {form.sent_width} numbers, others have {sent_width(self.forms)}"
            )
        return form.to_dict()

    def _try_encoder(self, check: Callable[..., None] | None, inputs: Mapping[str, Any] | None) -> None:
        if check is None:
            return
        if inputs is None:
            raise ModelError("the shapes announce rows of image features, but no pixels were given.")
        with torch.random.fork_rng([]):  # building a model draws numbers; a resumed run must not see it
            check(inputs)

    def _try_stages(self, check: Callable[..., None] | None, batch: StepBatch, microbatch: int) -> None:
        if check is None:
            return
        inputs = batch.text[microbatch]
        assert inputs is not None
        with torch.random.fork_rng([]):
            check(inputs, batch.shape.microbatches[microbatch][self._place.replica].num_features, self.forms)

    def _some_try(self, sources: Collection[int], tried: Callable[[], None]) -> None:
        all_try(tried if self._place.rank in sources else _nothing)


def _nothing() -> None:
    return None


def _failure(error: Exception, microbatch: int, rank: int) -> dict[str, Any]:
    what = f"{type(error).__name__}: {error}"
    return {"error": f"the encoder failed on microbatch {microbatch} (rank {rank}): {what}"}


def _format_of(told: dict[str, Any]) -> FeatureFormat:
    if "error" in told:
        raise ShapeMismatchError(told["error"])
    return FeatureFormat.from_dict(told)


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
