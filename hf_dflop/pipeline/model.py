"""A stock vision-language model, run through the pipeline of a plan.

In: a transformers model, a plan, the default process group. Out: a module that holds this rank's share of the
parameters under their stock names, and `step`: forward and backward of a step's microbatches, gradients as one process
would have.

Assumptions: all ranks call the same methods in the same order, with the same shapes; the model has the
same weights on all ranks (checked where ranks hold the same layers).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline.batch import StepBatch, StepResult
from hf_dflop.pipeline.bridge import Route, route_step
from hf_dflop.pipeline.check import check_chain
from hf_dflop.pipeline.check_encoder import check_encoder
from hf_dflop.pipeline.check_tensor import check_tensor_encoder, check_tensor_llm
from hf_dflop.pipeline.checkpoint import gather_state_dict, save_stock
from hf_dflop.pipeline.deferred import PipelineOutput, deferred_call
from hf_dflop.pipeline.features import FeatureFormat
from hf_dflop.pipeline.grads import clip_gradients, same_everywhere, squared_norm, sum_gradients
from hf_dflop.pipeline.groups import new_group
from hf_dflop.pipeline.handshake import agree_on_encoder, agree_on_format, agree_on_stages, all_try
from hf_dflop.pipeline.loss import count_label_tokens, sum_losses
from hf_dflop.pipeline.recorder import StepRecorder
from hf_dflop.pipeline.router import read_routers, sent_widths
from hf_dflop.pipeline.schedule import fits_plan, make_runtime, note_receives
from hf_dflop.pipeline.setup import checkpoint_layers, freeze, is_reentrant
from hf_dflop.pipeline.shards import Shards
from hf_dflop.pipeline.shell import drop
from hf_dflop.pipeline.skeleton import Skeleton, unwrap
from hf_dflop.pipeline.split import build_part, foreign_names, layer_ranges, owner_stage, read_cut
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.pipeline.tensor_rules import tensor_rules
from hf_dflop.pipeline.topology import Topology
from hf_dflop.pipeline.wire import StageStep, Wire
from hf_dflop.plan.actions import Kind, Order
from hf_dflop.plan.orders import make_order
from hf_dflop.plan.plan import Plan

__all__ = ["PipelineModel", "StepResult"]


class PipelineModel(nn.Module):
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
        super().__init__()
        size = dist.get_world_size()
        if size != plan.num_ranks:
            raise PlanError(f"the plan needs {plan.num_ranks} processes; {size} were launched. Launch as many.")
        self.plan = plan
        self.topology = Topology(plan=plan)
        self.place = self.topology.place(dist.get_rank())
        self.skeleton = Skeleton(model)
        model = unwrap(model)
        self.structure = read_cut(model, plan)
        routers = read_routers(model, self.structure, autocast)
        if any(routers) and plan.llm.tp > 1:
            raise PlanError("the balancing loss of routers (output_router_logits) runs with llm.tp=1 only.")
        self._tp_plan = dict(getattr(model, "tp_plan", None) or {})
        rules = tensor_rules(model, self._tp_plan, self.structure, plan)
        freeze(model, self.structure, plan.frozen)
        checkpoint_layers(model, self.structure, vision=plan.vision.checkpointing, llm=plan.llm.checkpointing)
        self.config, self.model_class = model.config, type(model)
        self.generation_config = getattr(model, "generation_config", None)  # Trainer aligns its tokens
        self.stock_names = tuple(name for name, _ in model.named_parameters())
        self.wire = Wire(
            dtype=model.get_input_embeddings().weight.dtype,
            device=torch.device("cpu" if device is None else device),
            llm_widths=sent_widths(routers, layer_ranges(plan), self.structure.hidden_size),
            autocast=autocast,
        )
        self._reentrant = is_reentrant(model)
        self._given_order = order
        self._orders: dict[int, Order] = {}
        self._runtimes: dict[Any, Any] = {}
        self._form: FeatureFormat | None = None
        self.needs_sum = False
        self.scaler: torch.amp.GradScaler | None = None  # of float16: scales the loss before the backward
        self.loss_factor = 1.0  # of the loss of `forward`, for loops that divide it by their accumulated calls
        self._sync = True
        self._earlier: dict[nn.Parameter, torch.Tensor] = {}
        self._check = check
        self._checked: set[bool] = set()
        self._recorder: StepRecorder | None = None
        trainable = self._trainable(model)
        parts = {stage: build_part(model, self.structure, plan, stage, routers) for stage in self.place.stages}
        drop(model, *foreign_names(self.structure, plan, self.place.stages))
        self._copies_group = new_group(self.topology.copies())
        self._tensor_group = new_group(self.topology.tensor_groups())
        self._tie_group = new_group(self._ties())
        same = self._same_over(model.parameters(), self._tensor_group)
        self.shards = self._split(model, rules)
        for part in parts.values():
            part.to(self.wire.device)
        for name, child in model.named_children():
            self.add_module(name, child)
        self._stages = [
            RaggedStage(part, stage, self.topology, self.place, trainable, self.wire) for stage, part in parts.items()
        ]
        self._check_same_weights(same)

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

    # Set-up -----------------------------------------------------------------------------------------------------

    def _trainable(self, model: Any) -> tuple[bool, ...]:
        stages = [False] * self.topology.num_stages
        owners: dict[nn.Parameter, int] = {}
        tied = model.get_input_embeddings().weight if self.structure.tied else None
        for name, parameter in model.named_parameters(remove_duplicate=False):
            stage = owner_stage(self.structure, self.plan, name)
            stages[stage] |= parameter.requires_grad
            shared = owners.setdefault(parameter, stage) != stage
            if shared and parameter.requires_grad and parameter is not tied:
                raise ModelError(
                    f"{name} is used on stages {owners[parameter]} and {stage}, and would be trained as two: "
                    "give both uses to one stage, or freeze it."
                )
        return tuple(stages)

    def _ties(self) -> list[tuple[int, ...]]:
        """The first and the last LLM rank of each replica where they hold copies of one weight."""
        first, last = self.topology.first_llm_stage, self.topology.last_stage
        if not self.structure.tied or self.topology.stage_columns[first] == self.topology.stage_columns[last]:
            return []
        replicas = range(self.plan.llm.dp)
        ends = (zip(self.topology.shards(first, r), self.topology.shards(last, r), strict=True) for r in replicas)
        return [pair for pairs in ends for pair in pairs]

    def _split(self, model: nn.Module, rules: Mapping[str, str]) -> Shards | None:
        """Take this rank's shares; what cannot be split is told on every rank."""
        made: list[Shards] = []

        def split() -> None:
            if self._tensor_group is not None:
                made.append(Shards(model, rules, self._tensor_group, self.wire.device))

        if rules:
            all_try(split)
        return made[0] if made else None

    def _tied_weight(self) -> nn.Parameter:
        holder = self.get_submodule(self.structure.embedding) if self._embeds else self._head()
        weight = holder.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def _embeds(self) -> bool:
        return self.topology.first_llm_stage in self.place.stages

    def _head(self) -> nn.Module:
        return next(
            m for name in self.structure.head for m in self.get_submodule(name).modules() if hasattr(m, "weight")
        )

    def _same_over(self, parameters: Iterable[nn.Parameter], group: Any) -> bool:
        return group is None or same_everywhere(list(parameters), group, self.wire.device)

    def _check_same_weights(self, same: bool) -> None:
        same &= self._same_over(self.parameters(), self._copies_group)
        if self._tie_group is not None:
            same &= self._same_over([self._tied_weight()], self._tie_group)
        agreed = torch.tensor(int(same), device=self.wire.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        if not agreed.item():
            raise ModelError(
                "ranks that hold the same layers have different weights; build the model with the same seed on every "
                "rank, or load it from a checkpoint."
            )

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
                    form=self._form,
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
        """At the first step, and at the first with images: the format of features; are the stages exact."""
        has_images = any(any(route.encoder_rows) for route in routes)
        if self._form is None and has_images:
            if self._check and self.structure.stack is not None:
                check_parts = partial(check_encoder, self.model_class, self.config, self.plan)
                agree_on_encoder(batch, routes, self.topology, self.place, check_parts)
            if self._check and self.plan.vision.tp > 1:
                check = self._tensor_check(check_tensor_encoder, self.plan.vision.tp)
                agree_on_encoder(batch, routes, self.topology, self.place, check, all_shards=True)
            vision = next((stage for stage in self._stages if stage.is_vision), None)
            self._form = agree_on_format(batch, routes, self.topology, self.place, self.wire, vision)
        if self._check and has_images not in self._checked and True not in self._checked:
            self._checked.add(has_images)
            form = self._form if has_images else None
            check = partial(check_chain, self.model_class, self.config, self.structure, self.plan)
            agree_on_stages(batch, self.topology, self.place, check, form)
            if self.plan.llm.tp > 1:
                check = self._tensor_check(check_tensor_llm, self.plan.llm.tp, tied=self.structure.tied)
                agree_on_stages(batch, self.topology, self.place, check, form, all_shards=True)

    def _tensor_check(self, check: Any, degree: int, **settings: Any) -> Any:
        fixed = (self.model_class, self.config, self._tp_plan, degree, self._tensor_group, self.wire.device)
        return partial(check, *fixed, **settings)

    def _set_aside(self) -> None:
        """Keep gradients that were summed already apart, so that they are not summed twice."""
        self._earlier = {p: p.grad for p in self.parameters() if p.grad is not None}
        for parameter in self._earlier:
            parameter.grad = None

    def add_gradients(self, gradients: Iterable[tuple[nn.Parameter, torch.Tensor]], times: float) -> None:
        """Add gradients of a call, not yet summed over replicas, to `.grad`."""
        if not self.needs_sum:
            self._set_aside()
        for parameter, grad in gradients:
            scaled = grad if times == 1.0 else grad.mul_(times)
            parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        self.needs_sum = True

    def sum_gradients(self) -> None:
        """Sum gradients over replicas, over the copies of tied embeddings, and where tensor-parallel ranks have parts;
        `step` calls it."""
        with contextlib.nullcontext() if self._recorder is None else self._recorder.summing():
            if self._copies_group is not None:
                sum_gradients(list(self.parameters()), self._copies_group)
            if self._tie_group is not None:
                sum_gradients([self._tied_weight()], self._tie_group)
            if self.shards is not None:
                self.shards.settle(list(self.named_parameters()))
        for parameter, grad in self._earlier.items():
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._earlier = {}
        self.needs_sum = False

    # What an optimizer loop needs -----------------------------------------------------------------------------------

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters (or shares) that this rank counts where the whole model counts once, over all ranks."""
        if self.place.replica == 0:
            skip = self._tied_weight() if self._tie_group is not None and not self._embeds else None
            for name, parameter in self.named_parameters():
                is_mine = self.place.shard == 0 or (self.shards is not None and self.shards.is_split(name))
                if is_mine and parameter is not skip:
                    yield parameter

    def whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The whole parameter (or optimizer state of its shape) of which this rank's is `value`; with tensor
        parallelism all ranks of a stage and replica call it."""
        return value if self.shards is None else self.shards.whole(name, value)

    def share(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this rank has of a whole parameter, or of optimizer state of its shape."""
        return whole if self.shards is None else self.shards.share(name, whole)

    def grad_norm(self) -> torch.Tensor:
        """2-norm of the gradients of the whole model, on every rank."""
        squared = squared_norm(self.counted_parameters(), self.wire.device)
        dist.all_reduce(squared)
        norm = squared.sqrt()
        if self._recorder is not None:
            self._recorder.met()
        return norm

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that the norm over the whole model is at most `max_norm`; returns the norm before."""
        norm = self.grad_norm()
        clip_gradients(self.parameters(), max_norm, norm)
        if self._recorder is not None:
            self._recorder.synced()
        return norm

    def gather_state_dict(self) -> dict[str, torch.Tensor]:
        """The stock state dict of the whole model, in the memory of rank 0's host; empty on other ranks."""
        return gather_state_dict(self)

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Write a stock checkpoint that plain transformers loads; all ranks call it, rank 0 writes."""
        save_stock(self, folder, **kwargs)

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
