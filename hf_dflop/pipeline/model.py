"""A stock vision-language model, run through the pipeline of a plan.

In: a transformers model, a plan, the default process group. Out: a module that holds this rank's share of the
parameters under their stock names, and `step`: forward and backward of a step's microbatches, gradients as one process
would have.

Assumptions: all ranks call the same methods in the same order, with the same shapes; the model has the
same weights on all ranks (checked where ranks hold the same layers).
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline.batch import StepBatch, StepResult
from hf_dflop.pipeline.bridge import Route, route_step
from hf_dflop.pipeline.check import check_chain
from hf_dflop.pipeline.check_encoder import check_encoder
from hf_dflop.pipeline.check_tensor import check_tensor_encoder, check_tensor_llm
from hf_dflop.pipeline.deferred import PipelineOutput, deferred_call
from hf_dflop.pipeline.features import FeatureFormat
from hf_dflop.pipeline.handshake import agree_on_encoder, agree_on_formats, agree_on_stages, agree_on_videos, all_try
from hf_dflop.pipeline.kinds import refuse_sounds, refuse_videos, takes_videos
from hf_dflop.pipeline.loss import count_label_tokens, sum_losses
from hf_dflop.pipeline.recorder import StepRecorder
from hf_dflop.pipeline.schedule import fits_plan, make_runtime, note_receives
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.pipeline.weights import PipelineWeights
from hf_dflop.pipeline.wire import StageStep
from hf_dflop.plan.actions import Kind, Order
from hf_dflop.plan.orders import make_order
from hf_dflop.plan.plan import Plan

__all__ = ["PipelineModel", "StepResult"]


class PipelineModel(PipelineWeights):
    """The share of a model that one rank of a plan runs.

    `named_parameters`, `state_dict` and the module tree have the stock names; parts of other ranks are missing from
    them. Build it with [`~PipelineModel.from_model`] or [`~PipelineModel.from_pretrained`].

    Example:
        >>> pipe = hf_dflop.PipelineModel.from_pretrained(model_id, plan=plan)             # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-5)                      # doctest: +SKIP
        >>> result = pipe.step(batch)                                                      # doctest: +SKIP
        >>> pipe.clip_grad_norm_(1.0), optimizer.step(), optimizer.zero_grad()             # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        *,
        plan: Plan,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        order: Order | None = None,
        check: bool = True,
    ) -> None:
        super().__init__(model, plan=plan, device=device, autocast=autocast)
        self._given_order = order
        self._orders: dict[int, Order] = {}
        self._runtimes: dict[Any, Any] = {}
        self._forms: dict[str, FeatureFormat] = {}
        self._takes_videos = takes_videos(model.get_submodule(self.structure.body))
        self.scaler: torch.amp.GradScaler | None = None  # of float16: scales the loss before the backward
        self.loss_factor = 1.0  # of the loss of `forward`, for loops that divide it by their accumulated calls
        self._sync = True
        self._check = check
        self._checked: set[bool] = set()
        self._stages = [
            RaggedStage(part, stage, self.topology, self.place, self._trainable_stages, self.wire)
            for stage, part in self._parts.items()
        ]

    @classmethod
    def from_model(cls, model: Any, *, plan: Plan, **settings: Any) -> "PipelineModel":
        """Take over a model that every rank has built with the same weights; parts of other ranks are freed.

        Args:
            model (`PreTrainedModel` or `PeftModel`):
                A vision-language model with its LM head, on the CPU, not wrapped but by peft.
            plan (`Plan`): a plan for as many processes as were launched.
            device (`torch.device`, *optional*): of this rank; by default the CPU.
            autocast (`torch.dtype`, *optional*): compute under autocast in that type; tensors travel in the
                parameters' type.
            order (`Order`, *optional*): actions of a step; by default those of `plan.schedule`.
            check (`bool`, defaults to `True`): at the first step, try the stages on a small copy of the model.

        Raises:
            PlanError: the plan does not fit the model or the number of processes.
            ModelError: the model cannot be cut, or differs between ranks.
        """
        return cls(model, plan=plan, **settings)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        *,
        plan: Plan,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        order: Order | None = None,
        check: bool = True,
        **kwargs: Any,
    ) -> "PipelineModel":
        """Load a checkpoint and keep this rank's share; `kwargs` go to the model's own `from_pretrained`.

        The checkpoint is read whole into the host's memory, and only this rank's part goes to the device.
        """
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(id_or_path, **kwargs)
        return cls(model, plan=plan, device=device, autocast=autocast, order=order, check=check)

    def train(self, mode: bool = True) -> "PipelineModel":
        super().train(mode)
        for stage in getattr(self, "_stages", ()):
            stage.submod.train(mode)
        return self

    def order_for(self, num_microbatches: int) -> Order:
        """The actions of a step of that many microbatches."""
        if self._given_order is not None:
            fits_plan(self._given_order, self.topology.stage_columns, num_microbatches)
            return self._given_order
        if num_microbatches not in self._orders:
            self._orders[num_microbatches] = make_order(
                self.plan.schedule, stage_rank=self.topology.stage_columns, num_microbatches=num_microbatches
            )
        return self._orders[num_microbatches]

    def _runtime(self, order: Order, num_microbatches: int) -> Any:
        key = (num_microbatches, id(order))
        if key not in self._runtimes:
            fits_plan(order, self.topology.stage_columns, num_microbatches)
            split = any(action.kind is Kind.BACKWARD_INPUT for line in order for action in line)
            if split and self._reentrant:
                raise PlanError(
                    "reentrant activation checkpointing does not go with a split backward (zero bubble); use "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}, or another schedule.'
                )
            if len(self._runtimes) >= 8:
                self._runtimes.clear()
            self._runtimes[key] = (make_runtime(self._stages, order, num_microbatches), order)
            note_receives(self._runtimes[key][0], self._recorder)
        return self._runtimes[key][0]

    # A step -------------------------------------------------------------------------------------------------------

    def step(
        self,
        batch: StepBatch,
        *,
        backward: bool = True,
        sync: bool = True,
        loss_scale: float | torch.Tensor | None = None,
        order: Order | None = None,
        keep_logits: bool = False,
        mean: bool = False,
    ) -> StepResult:
        """Run all microbatches of a call; gradients are added to `.grad`.

        Args:
            batch (`StepBatch`): shapes of the call, the same on all ranks, and this rank's inputs.
            backward (`bool`, defaults to `True`): without it only the loss (and logits) is computed.
            sync (`bool`, defaults to `True`):
                Sum gradients over replicas at the end. Leave it out for all but the last of several calls of one
                optimizer step; what was left out is summed then.
            loss_scale (`float` or `torch.Tensor`, *optional*):
                Factor on the loss before the backward, the same on all ranks; by default that of `scaler`, or 1.
            order (`Order`, *optional*): the actions of this call, instead of the plan's.
            keep_logits (`bool`, defaults to `False`): return logits.
            mean (`bool`, defaults to `False`):
                Divide the loss of each microbatch by its own label tokens, as an evaluation does, not by the step's.

        Raises:
            ShapeMismatchError: tensors are not of the shapes that were announced.
        """
        shape = batch.shape
        if self._recorder is not None and backward:
            self._recorder.begin_call(shape.num_microbatches)
        routes = route_step(shape, self.topology.replicas(0), colocated=not self.topology.disjoint)
        runtime = self._runtime(order or self.order_for(shape.num_microbatches), shape.num_microbatches)
        self._agree(batch, routes)
        if loss_scale is None:
            one = torch.ones((), device=self.wire.device)
            loss_scale = 1.0 if self.scaler is None or not backward else self.scaler.scale(one)
        divisor = None if mean else torch.tensor(max(shape.label_tokens, 1), device=self.wire.device)
        steps: list[StageStep] = []
        for stage in self._stages:
            given = batch.vision if stage.is_vision else batch.text
            steps.append(
                StageStep(
                    shape=shape,
                    routes=routes,
                    inputs=list(given) or [None] * shape.num_microbatches,
                    forms=self._forms,
                    loss_divisor=divisor,
                    loss_scale=loss_scale,
                    backward=backward,
                    keep_logits=keep_logits,
                )
            )
        if backward and not self.needs_sum:
            self._set_aside()
        if self.shards is not None and self.training:
            self.shards.same_random()
        for stage, step in zip(self._stages, steps, strict=True):
            stage.begin(step)
        runtime._has_backward = backward
        runtime._step_microbatches(return_outputs=False)
        for stage in self._stages:
            stage.finish()
        if backward:
            self.needs_sum = True
            if sync:
                self.sum_gradients()
        last = next(
            (s for stage, s in zip(self._stages, steps, strict=True) if stage.is_last and self.place.shard == 0), None
        )
        tokens = 0
        if last is not None:
            tokens = sum(count_label_tokens(t["labels"]) for t in batch.text if t is not None and "labels" in t)
        loss, counted = sum_losses(last.losses.values() if last else (), tokens, self.wire.device)
        if self._recorder is not None:
            self._recorder.met()
        return StepResult(
            loss=loss, label_tokens=counted, logits=last.logits if last else {}, losses=last.losses if last else {}
        )

    def record(self, recorder: StepRecorder | None) -> None:
        """Tell `recorder` what the steps from now on do and when; `None` ends it. See [`PipelineTrace`]."""
        self._recorder = recorder
        for runtime, _ in self._runtimes.values():
            note_receives(runtime, recorder)
        for stage in self._stages:
            stage.recorder = recorder

    def _agree(self, batch: StepBatch, routes: tuple[Route, ...]) -> None:
        """At the first step, and the first with images or videos: the format of features; are the stages exact."""
        has_images = any(any(route.encoder_rows) for route in routes)
        name, given = self.model_class.__name__, (*batch.text, *batch.vision)

        def refuse() -> None:
            refuse_sounds(given, name)
            refuse_videos(given, name, self.plan, taken=self._takes_videos)

        if has_images and not self._forms:
            all_try(refuse)
        else:
            refuse()
        if not self._forms and has_images:
            if self._check and self.structure.stack is not None:
                check_parts = partial(check_encoder, self.model_class, self.config, self.plan)
                agree_on_encoder(batch, routes, self.topology, self.place, check_parts)
            if self._check and self.plan.vision.tp > 1:
                check = self._tensor_check(check_tensor_encoder, self.plan.vision.tp)
                agree_on_encoder(batch, routes, self.topology, self.place, check, all_shards=True)
        found: dict[str, FeatureFormat] = {}
        if has_images and len(self._forms) < (2 if self._takes_videos else 1):
            vision = next((stage for stage in self._stages if stage.is_vision), None)
            found = agree_on_formats(batch, routes, self.topology, self.place, self.wire, vision, self._forms)
            self._forms |= found
        if self._check and has_images not in self._checked and True not in self._checked:
            self._checked.add(has_images)
            check = partial(check_chain, self.model_class, self.config, self.structure, self.plan)
            agree_on_stages(batch, self.topology, self.place, check, self._forms)
            if self.plan.llm.tp > 1:
                check = self._tensor_check(check_tensor_llm, self.plan.llm.tp, tied=self.structure.tied)
                agree_on_stages(batch, self.topology, self.place, check, self._forms, all_shards=True)
        if self._check and "video" in found:
            check = partial(check_chain, self.model_class, self.config, self.structure, self.plan)
            agree_on_videos(batch, self.topology, self.place, check, self._forms)

    def _tensor_check(self, check: Any, degree: int, **settings: Any) -> Any:
        fixed = (self.model_class, self.config, self._tp_plan, degree, self._tensor_group, self.wire.device)
        return partial(check, *fixed, **settings)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Calls inside leave the sum over replicas to the first call after it; accelerate's `accumulate` enters it."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def forward(self, batch: StepBatch | Mapping[str, Any]) -> PipelineOutput:
        """Run a call of a hand-written loop.

        In training mode the schedule runs forward and backward, and `loss.backward()` adds the gradients to `.grad`;
        without gradients, or in evaluation mode, the loss alone is computed.
        """
        if not isinstance(batch, StepBatch):
            raise ModelError(
                "PipelineModel takes a StepBatch: shapes of all ranks' microbatches, inputs of this one's."
            )
        if self.training and torch.is_grad_enabled():
            return deferred_call(self, batch, sync=self._sync)
        result = self.step(batch, backward=False)
        loss = torch.tensor(result.loss * self.loss_factor, dtype=torch.float64, device=self.wire.device)
        return PipelineOutput(loss=loss, label_tokens=result.label_tokens)
