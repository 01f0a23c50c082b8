"""The weights that one rank of a plan holds, and their gradients.

In: a transformers model, the same on all ranks; a plan; the default process group. Out: a module with this rank's
share of the parameters under their stock names; their gradients summed over the ranks that hold the same; norms of
the whole model; whole tensors and shares; stock checkpoints.

Assumptions: all ranks call the same methods in the same order; the model has the same weights on all ranks (checked
where ranks hold the same layers).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline.checkpoint import gather_state_dict, save_stock
from hf_dflop.pipeline.grads import clip_gradients, same_everywhere, squared_norm, sum_gradients
from hf_dflop.pipeline.groups import new_group
from hf_dflop.pipeline.handshake import all_try
from hf_dflop.pipeline.recorder import StepRecorder
from hf_dflop.pipeline.router import read_routers, sent_widths
from hf_dflop.pipeline.setup import checkpoint_layers, freeze, is_reentrant
from hf_dflop.pipeline.shards import Shards
from hf_dflop.pipeline.shell import drop
from hf_dflop.pipeline.skeleton import Skeleton, unwrap
from hf_dflop.pipeline.split import build_part, foreign_names, layer_ranges, owner_stage, read_cut, unread_names
from hf_dflop.pipeline.tensor_rules import tensor_rules
from hf_dflop.pipeline.topology import Place, Topology
from hf_dflop.pipeline.wire import Wire
from hf_dflop.plan.plan import Plan

__all__ = ["PipelineWeights", "own_place"]


def own_place(plan: Plan) -> tuple[Topology, Place]:
    """The plan's ranks, and where this process stands among them; raises `PlanError` where it is not launched so."""
    topology, size = Topology(plan=plan), dist.get_world_size()
    if size != plan.num_ranks:
        raise PlanError(f"the plan needs {plan.num_ranks} processes; {size} were launched. Launch as many.")
    return topology, topology.place(dist.get_rank())


class PipelineWeights(nn.Module):
    """What one rank holds of a model; see [`PipelineModel`], which runs it."""

    def __init__(
        self, model: Any, *, plan: Plan, device: torch.device | str | None = None, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.plan = plan
        self.topology, self.place = own_place(plan)
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
        self.needs_sum = False
        self._earlier: dict[nn.Parameter, torch.Tensor] = {}
        self._recorder: StepRecorder | None = None
        self._trainable_stages = self._trainable(model)
        self._parts = {stage: build_part(model, self.structure, plan, stage, routers) for stage in self.place.stages}
        drop(model, *foreign_names(self.structure, plan, self.place.stages))
        self._copies_group = new_group(self.topology.copies())
        self._tensor_group = new_group(self.topology.tensor_groups())
        self._tie_group = new_group(self._ties())
        same = self._same_over(model.parameters(), self._tensor_group)
        self.shards = self._split(model, rules)
        for part in self._parts.values():
            part.to(self.wire.device)
        for name, child in model.named_children():
            self.add_module(name, child)
        self._check_same_weights(same)

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

    # Gradients -------------------------------------------------------------------------------------------------------

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

    def lasting_names(self) -> dict[str, str]:
        """Name of a parameter of this rank -> what it is called under every plan: a tied head as the embedding is."""
        names = {name: name for name, _ in self.named_parameters()}
        if self.structure.tied and not self._embeds and self.topology.last_stage in self.place.stages:
            tied = self._tied_weight()
            names |= {n: f"{self.structure.embedding}.weight" for n, p in self.named_parameters() if p is tied}
        return names

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

    def read_weights(self, folder: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What a stock checkpoint holds, in `dtype`, under stock names; what other ranks need is on the meta device
        where it can be left unread."""
        return self.skeleton.load(folder, dtype, unread_names(self.structure, self.plan, self.place.stages))

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Write a stock checkpoint that plain transformers loads; all ranks call it, rank 0 writes."""
        save_stock(self, folder, **kwargs)
