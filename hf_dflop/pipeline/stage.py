"""One stage of one replica, on torch.distributed.pipelining's stage base, for microbatches of different shapes.

In: the stage's module, the step's shapes and routes, this rank's inputs. Out: what torch's schedule runtime calls:
receives into buffers sized from the shapes, sends of views, forward, backward whole or in two parts.

What differs from torch's own stage:

- Every microbatch has its own size, known on both sides, so nothing is negotiated; an output of another size stops
  with the numbers before it is sent.
- The edge from the encoder has several peers, see `bridge`.
- Tensor-parallel ranks of a stage have the same inputs and outputs: each receives the whole from one neighbour.
- A replica without samples in a microbatch computes nothing and sends nothing.
- An input that needs no gradient (text only, before anything trained) gets none. Where the backward is split, such a
  microbatch runs its whole backward in place of the weights' part: torch's split would lose the weights before the
  first input that requires a gradient.
- A stage that uses one weight twice (tied embeddings in one stage) runs its whole backward in place of the input's
  part: torch's split would go through the graph twice.

Assumption: the runtime passes no loss; the last stage keeps its own.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.stage import _PipelineStageBase

from hf_dflop.errors import ShapeMismatchError
from hf_dflop.pipeline.bridge import Piece
from hf_dflop.pipeline.encoder import VisionPart
from hf_dflop.pipeline.kinds import sent_width
from hf_dflop.pipeline.loss import count_label_tokens
from hf_dflop.pipeline.recorder import StepRecorder
from hf_dflop.pipeline.shape import MicrobatchShape
from hf_dflop.pipeline.split import LlmPart
from hf_dflop.pipeline.states import Shapes, packed_size
from hf_dflop.pipeline.topology import Place, Topology
from hf_dflop.pipeline.wire import StageStep, Wire
from hf_dflop.plan.actions import Kind

__all__ = ["RaggedStage"]

_MAX_PENDING_SENDS = 8


class RaggedStage(_PipelineStageBase):
    """A stage that torch's `_PipelineScheduleRuntime` can run.

    Args:
        part (`VisionPart` or `LlmPart`): the stage's module.
        stage (`int`): number of the stage; the encoder's come first.
        topology (`Topology`), place (`Place`): the plan's ranks, and this one.
        trainable (`tuple[bool, ...]`): of each stage, whether it has a parameter that requires a gradient.
        wire (`Wire`): how tensors travel.
    """

    def __init__(
        self,
        part: VisionPart | LlmPart,
        stage: int,
        topology: Topology,
        place: Place,
        trainable: tuple[bool, ...],
        wire: Wire,
    ) -> None:
        # The base class wants a group of one replica's ranks; ours are addressed by the plan, over the whole world.
        super().__init__(part, stage, max(topology.num_stages, dist.get_world_size()), wire.device)
        self.num_stages = topology.num_stages
        self.group_rank, self.group_size = place.column, topology.num_columns
        self.topology, self.place, self.trainable, self.wire = topology, place, trainable, wire
        self.replica = place.replica
        self.first_llm_stage = topology.first_llm_stage
        self.is_vision = stage < self.first_llm_stage
        names = [id(parameter) for _, parameter in part.named_parameters(remove_duplicate=False)]
        self._splits = len(names) == len(set(names))
        self.step: StageStep
        self.recorder: StepRecorder | None = None
        self._received: dict[int, torch.Tensor | None] = {}
        self._grads: dict[int, torch.Tensor | None] = {}  # of the outputs
        self._input_grads: dict[int, torch.Tensor | None] = {}
        self._saved: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._weights: dict[int, Callable[[], None]] = {}
        self._incoming: dict[int, Shapes] = {}  # of a later stage of the encoder
        self._pending: deque[tuple[int, list[Any]]] = deque()

    # What a call needs ------------------------------------------------------------------------------------------

    def begin(self, step: StageStep) -> None:
        """Take the inputs of a call."""
        self.step = step
        self.has_backward = step.backward
        self.chunks = step.shape.num_microbatches
        self.args_recv_info = {0: ()}

    def finish(self) -> None:
        """Wait for what is still being sent, and forget the call."""
        while self._pending:
            self._wait_oldest()
        for kept in (self._received, self._grads, self._input_grads, self._saved, self._weights, self._incoming):
            kept.clear()
        del self.step

    def shape_of(self, microbatch: int) -> MicrobatchShape:
        return self.step.shape.microbatches[microbatch][self.replica]

    def edge_has_grad(self, stage: int, microbatch: int) -> bool:
        """Whether a gradient goes back from `stage` to the one before; the same answer on both sides."""
        if not self.has_backward:
            return False
        first = self.first_llm_stage
        if any(self.trainable[first:stage]):
            return True
        encodes = any(self.trainable[: min(stage, first)])
        if self.is_vision:  # decided by piece: a piece has rows
            return encodes
        return encodes and self.shape_of(microbatch).num_features > 0

    def _idle(self, microbatch: int) -> bool:
        if self.is_vision:
            return self.step.routes[microbatch].encoder_rows[self.replica] == 0
        return self.shape_of(microbatch).rows == 0

    def _output_size(self, microbatch: int) -> tuple[int, ...]:
        if self.is_vision:
            if self.stage_index + 1 < self.first_llm_stage:
                output, _ = self._saved[microbatch]
                assert output is not None
                return tuple(output.shape)
            return (self.step.routes[microbatch].encoder_rows[self.replica], sent_width(self.step.forms))
        shape = self.shape_of(microbatch)
        return (shape.rows, shape.length, self.wire.llm_widths[self.stage_index - self.first_llm_stage])

    def _input_size(self, microbatch: int) -> tuple[int, ...]:
        if self.is_vision:
            return packed_size(self._incoming[microbatch])
        shape = self.shape_of(microbatch)
        if self.stage_index == self.first_llm_stage:
            return (shape.num_features, sent_width(self.step.forms))
        return (shape.rows, shape.length, self.wire.llm_widths[self.stage_index - self.first_llm_stage - 1])

    # Peers ------------------------------------------------------------------------------------------------------

    def _peers_before(self, microbatch: int, whole: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """(rank, view of the stage's input or of its gradient) of each peer of the stage before."""
        if self.stage_index == self.first_llm_stage:
            pieces = self.step.routes[microbatch].to_llm(self.replica)
            return [(piece.encoder, _rows(whole, piece.target, piece)) for piece in pieces]
        return [(self.replica, whole)]

    def _peers_after(self, microbatch: int, whole: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        if self.stage_index + 1 == self.first_llm_stage:
            pieces = self.step.routes[microbatch].from_encoder(self.replica)
            return [(piece.llm, _rows(whole, piece.source, piece)) for piece in pieces]
        return [(self.replica, whole)]

    def _receive(self, stage: int, views: list[tuple[int, torch.Tensor]]) -> list[dist.P2POp]:
        shard = self.place.shard
        return [dist.P2POp(dist.irecv, view, self.topology.sender(stage, replica, shard)) for replica, view in views]

    def _send(self, stage: int, microbatch: int, views: list[tuple[int, torch.Tensor]]) -> None:
        # Sent here, not by the runtime: that keeps every tensor that was sent until the step ends.
        kind = Kind.FORWARD if stage > self.stage_index else Kind.BACKWARD
        with nullcontext() if self.recorder is None else self.recorder.send(self.stage_index, kind, microbatch):
            while len(self._pending) >= _MAX_PENDING_SENDS:
                self._wait_oldest()
            own = self.topology.num_shards(self.stage_index)
            works = [
                (dist.isend(view, rank), view)
                for replica, view in views
                for rank in self.topology.receivers(stage, replica, self.place.shard, own)
            ]
            self._pending.append((microbatch, works))

    def _wait_oldest(self) -> None:
        for work, _ in self._pending.popleft()[1]:
            work.wait()

    def _wait_sent(self, microbatch: int) -> None:
        """Free what was sent forward for a microbatch whose gradient has come back."""
        kept = [entry for entry in self._pending if entry[0] != microbatch]
        for entry in self._pending:
            if entry[0] == microbatch:
                for work, _ in entry[1]:
                    work.wait()
        self._pending = deque(kept)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self._idle(fwd_chunk_id):
            return []
        if self.is_vision:
            self._incoming[fwd_chunk_id] = self._ask_shapes(fwd_chunk_id)
        size = self._input_size(fwd_chunk_id)
        if not size[0]:
            return []
        buffer = torch.empty(size, dtype=self.wire.dtype, device=self.device)
        self._received[fwd_chunk_id] = buffer
        return self._receive(self.stage_index - 1, self._peers_before(fwd_chunk_id, buffer))

    def _ask_shapes(self, microbatch: int) -> Shapes:
        """What precedes the encoder's layers gives the shapes that run through them: nothing is negotiated."""
        assert isinstance(self.submod, VisionPart)
        with self.wire.context():
            return self.submod.incoming(self.wire.to_device(self._inputs_of(microbatch)))

    def _inputs_of(self, microbatch: int) -> Mapping[str, Any]:
        inputs = self.step.inputs[microbatch]
        if inputs is None:
            raise ShapeMismatchError(
                f"the shapes say that microbatch {microbatch} has work for stage {self.stage_index} of replica "
                f"{self.replica}, but it was given no inputs"
            )
        return inputs

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        output, _ = self._saved[fwd_chunk_id]
        if output is not None:
            self._send(self.stage_index + 1, fwd_chunk_id, self._peers_after(fwd_chunk_id, output.detach()))
        if not self.has_backward:
            del self._saved[fwd_chunk_id]
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last or self._idle(bwd_chunk_id) or not self.edge_has_grad(self.stage_index + 1, bwd_chunk_id):
            return []
        buffer = torch.empty(self._output_size(bwd_chunk_id), dtype=self.wire.dtype, device=self.device)
        self._grads[bwd_chunk_id] = buffer
        return self._receive(self.stage_index + 1, self._peers_after(bwd_chunk_id, buffer))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        grad = self._input_grads.pop(bwd_chunk_id, None)
        if not self._idle(bwd_chunk_id) and self.edge_has_grad(self.stage_index, bwd_chunk_id):
            if grad is None:  # an input that the model did not use
                grad = torch.zeros(self._input_size(bwd_chunk_id), dtype=self.wire.dtype, device=self.device)
            self._send(self.stage_index - 1, bwd_chunk_id, self._peers_before(bwd_chunk_id, grad.contiguous()))
        return []

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._received[mb_index] = None if prev_stage_outputs is None else prev_stage_outputs.detach()

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return self._input_grads.pop(mb_index, None)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        self._grads[mb_index] = next_stage_bwd_outputs

    # Compute ----------------------------------------------------------------------------------------------------

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        with self._recorded(Kind.FORWARD, fwd_chunk_id):
            return self._forward(fwd_chunk_id)

    def _recorded(self, kind: Kind, microbatch: int) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.action(self.stage_index, kind, microbatch)

    def _forward(self, fwd_chunk_id: int) -> Any:
        received = self._received.pop(fwd_chunk_id, None)
        if self._idle(fwd_chunk_id):
            self._saved[fwd_chunk_id] = (None, None)
            return None
        if received is not None:
            received.requires_grad_(self.edge_has_grad(self.stage_index, fwd_chunk_id))
        learns = self.has_backward and (any(self.trainable[: self.stage_index + 1]))
        try:
            with torch.set_grad_enabled(learns), self.wire.context():
                output = self._compute(fwd_chunk_id, received)
        except Exception as error:
            error.add_note(
                f"in the forward of microbatch {fwd_chunk_id} on stage {self.stage_index} "
                f"({'encoder' if self.is_vision else 'LLM'}) of replica {self.replica}"
            )
            raise
        self._saved[fwd_chunk_id] = (output, received)
        columns = self.topology.stage_columns
        if not self.has_backward and (self.is_last or columns[self.stage_index] == columns[self.stage_index + 1]):
            del self._saved[fwd_chunk_id]
        return output

    def _compute(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        step = self.step
        inputs = self.wire.to_device(self._inputs_of(microbatch))
        if isinstance(self.submod, VisionPart):
            output = self.submod(inputs, received, step.forms, self._incoming.get(microbatch))
            if not self.submod.last:
                return self._sendable(output)
        else:
            self._check_text(microbatch, inputs)
            divisor = step.loss_divisor
            if divisor is None and self.is_last:
                divisor = torch.tensor(max(count_label_tokens(inputs["labels"]), 1), device=self.device)
            result = self.submod(inputs, received, step.forms, divisor)
            if self.is_last:
                step.losses[microbatch] = result.loss.detach()
                if step.keep_logits:
                    step.logits[microbatch] = result.logits.detach()
                return result.loss * step.loss_scale
            output = result
        expected = self._output_size(microbatch)
        if tuple(output.shape) != expected:
            what = "rows of features" if self.is_vision else "hidden states"
            raise ShapeMismatchError(
                f"microbatch {microbatch} gives {what} of shape {tuple(output.shape)}, but its shape columns say "
                f"{expected}: the dataset was annotated with another processor or collator. Profile it again"
            )
        return self._sendable(output)

    def _sendable(self, output: torch.Tensor) -> torch.Tensor:
        output = output.to(self.wire.dtype).contiguous()
        return output.clone() if output._is_view() else output  # a split backward detaches it in place

    def _check_text(self, microbatch: int, inputs: Mapping[str, Any]) -> None:
        shape = self.shape_of(microbatch)
        found = tuple(inputs["input_ids"].shape)
        if found != (shape.rows, shape.length):
            raise ShapeMismatchError(
                f"input_ids of microbatch {microbatch} of replica {self.replica} has the shape {found}, but its "
                f"shape columns say {(shape.rows, shape.length)}. Profile the dataset with this collator's settings"
            )

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not self.has_backward:
            return
        output, received = self._saved.pop(bwd_chunk_id)
        grad = self._grads.pop(bwd_chunk_id, None)
        self._wait_sent(bwd_chunk_id)
        with self._recorded(Kind.BACKWARD if full_backward else Kind.BACKWARD_INPUT, bwd_chunk_id):
            self._backward(bwd_chunk_id, output, received, grad, full_backward=full_backward)

    def _backward(
        self,
        bwd_chunk_id: int,
        output: torch.Tensor | None,
        received: torch.Tensor | None,
        grad: torch.Tensor | None,
        *,
        full_backward: bool,
    ) -> None:
        self._weights[bwd_chunk_id] = _nothing
        if output is None or not output.requires_grad or (grad is None and not self.is_last):
            return
        if full_backward or not self._splits:
            if full_backward:
                self._weights.pop(bwd_chunk_id)
            torch.autograd.backward(output, grad)
            self._keep_grad(bwd_chunk_id, received)
        elif not self._can_split(received):
            self._weights[bwd_chunk_id] = lambda: torch.autograd.backward(output, grad)
        else:
            _, groups = stage_backward_input(
                [output], None if grad is None else [grad], [received], self.submod.parameters()
            )
            self._weights[bwd_chunk_id] = lambda: _weight_backward(self.submod, groups)
            self._keep_grad(bwd_chunk_id, received)

    def _can_split(self, received: torch.Tensor | None) -> bool:
        """Whether the input's gradient is wanted; without it torch's split would lose weights."""
        return received is not None and received.requires_grad

    def _keep_grad(self, microbatch: int, received: torch.Tensor | None) -> None:
        if received is not None and received.requires_grad:
            self._input_grads[microbatch] = received.grad
            received.grad = None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if self.has_backward:
            with self._recorded(Kind.BACKWARD_WEIGHT, bwd_chunk_id):
                self._weights.pop(bwd_chunk_id)()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Replicas are summed after the step, see `grads`."""

    # What torch negotiates, and we know ---------------------------------------------------------------------------

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _create_grad_recv_info(self, act_send_info: Any) -> tuple[Any, ...]:
        return ()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []


def _rows(whole: torch.Tensor, start: int, piece: Piece) -> torch.Tensor:
    return whole[start : start + piece.rows]


def _nothing() -> None:
    return None


def _weight_backward(module: torch.nn.Module, groups: list[dict[str, Any]]) -> None:
    stage_backward_weight(module.parameters(), groups)
