"""A stage split over tensor-parallel ranks: transformers' styles, on plain parameters.

In: modules, the rules of `tensor_rules`, the ranks that run them together. Out: the same modules, whose weights are
this rank's shares, and `Shards`, which tells whole tensors from shares.

transformers' styles compute with DTensors. A parameter stays a plain tensor here, and is a DTensor only while its
module runs: optimizers, norms, sums over replicas and checkpoints see plain tensors.

Gradients: that of a share is the share of the gradient. That of a whole parameter is full on every rank, since styles
sum what flows back over the ranks; to keep them bit-equal, all take the first rank's. Where a style says that each
rank has a part of it (norms of single heads), the parts are summed here, once a step: transformers sums `.grad` itself
after every backward, which would count earlier microbatches again.

Assumptions: all ranks of a group get the same inputs, and run the same actions in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_dflop.errors import PlanError
from hf_dflop.pipeline.grads import sum_gradients, take_first
from hf_dflop.pipeline.shell import Foreign
from hf_dflop.pipeline.tensor_rules import PARTIAL_STYLE

__all__ = ["Shards"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    placements: tuple[Any, ...]
    shape: torch.Size
    """Of the whole."""

    @property
    def is_split(self) -> bool:
        return not all(placement.is_replicate() for placement in self.placements)

    def local_shape(self, degree: int) -> torch.Size:
        (placement,) = self.placements
        shape = list(self.shape)
        if self.is_split:
            shape[placement.dim] //= degree
        return torch.Size(shape)


class Shards:
    """How one rank's parameters are split.

    Args:
        model (`nn.Module`): with the parameters of this rank, whole; changed in place.
        rules (`Mapping[str, str]`): parameters and modules → style; what the model lacks is passed over.
        group: the process group of the tensor-parallel ranks.
        device (`torch.device`): where shares are put.

    Raises:
        PlanError: a parameter cannot be split evenly.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, str], group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        # torch keeps meshes in caches, and takes one of the same ranks and names for the same: name its group.
        self._mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=(f"tp{group.group_name}",))
        self._layouts: dict[str, _Layout] = {}
        self._partial: set[str] = set()
        modules = dict(model.named_modules())
        shares: dict[nn.Parameter, nn.Parameter] = {}
        split: dict[str, dict[str, nn.Parameter]] = {}
        for name, style in rules.items():
            owner, _, key = name.rpartition(".")
            if name in modules:
                if not isinstance(modules[name], Foreign):
                    self._hook(model, modules[name], style)
            elif owner in modules and modules[owner]._parameters.get(key) is not None:
                found = split.setdefault(owner, {})
                found[key] = self._split(modules[owner], name, key, style)
        for owner, wholes in split.items():
            self._make_plain(modules[owner], owner, wholes, shares)

    def _split(self, module: nn.Module, name: str, key: str, style: str) -> nn.Parameter:
        """Let the style put a DTensor into the place of the parameter; returns the whole."""
        from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

        whole = module._parameters[key]
        assert whole is not None
        if style == PARTIAL_STYLE:
            self._partial.add(name)
            return whole
        moved = nn.Parameter(whole.detach().to(self._device), requires_grad=whole.requires_grad)
        module._parameters[key] = moved
        ALL_PARALLEL_STYLES[style].validate_param(module, key, self._mesh, parameter_name=name)
        ALL_PARALLEL_STYLES[style].shard_param(module, key, self._mesh)
        made = module._parameters[key]
        if not isinstance(made, DTensor):  # the style splits its module's activations alone
            module._parameters[key] = whole
        else:
            for placement in made.placements:
                size = 0 if placement.is_replicate() else whole.shape[placement.dim]
                if size % (self._mesh.size() * getattr(placement, "split_factor", 1)):
                    raise PlanError(
                        f"{name} has the shape {tuple(whole.shape)}: {self._mesh.size()} tensor-parallel ranks do not "
                        f"divide {size}. Use a smaller tp."
                    )
            self._layouts[name] = _Layout(placements=tuple(made.placements), shape=whole.shape)
        return whole

    def _hook(self, model: Any, module: nn.Module, style: str) -> None:
        from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

        if style == PARTIAL_STYLE:
            return
        if style == "mla_kv_a_proj":  # where this style looks for the size of the rotary part
            module.config = model.config.get_text_config()
        ALL_PARALLEL_STYLES[style].install_forward(module, self._mesh)

    def _make_plain(
        self,
        module: nn.Module,
        owner: str,
        wholes: Mapping[str, nn.Parameter],
        shares: dict[nn.Parameter, nn.Parameter],
    ) -> None:
        """Put shares as plain parameters in the place of DTensors, which come back while the module runs."""
        layouts: dict[str, _Layout] = {}
        for key, whole in wholes.items():
            made = module._parameters[key]
            if not isinstance(made, DTensor):
                continue
            if whole not in shares:  # tied weights stay one
                share = made.to_local().detach().clone()  # a copy: it must not keep the whole alive
                shares[whole] = nn.Parameter(share, requires_grad=whole.requires_grad)
            module._parameters[key] = shares[whole]
            layouts[key] = self._layouts[f"{owner}.{key}"]
        if not layouts:
            return
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            plain = {key: module._parameters[key] for key in layouts}
            for key, layout in layouts.items():
                module._parameters[key] = self._as_dtensor(plain[key], layout)
            try:
                return inner(*args, **kwargs)
            finally:
                module._parameters.update(plain)

        module.forward = forward

    def _as_dtensor(self, share: Any, layout: _Layout) -> Any:
        stride = torch.empty(layout.shape, device="meta").stride()
        return DTensor.from_local(
            share, self._mesh, layout.placements, run_check=False, shape=layout.shape, stride=stride
        )

    # Whole and share ------------------------------------------------------------------------------------------------

    def is_split(self, name: str) -> bool:
        """Whether this rank has a share of the parameter of that name, and others the rest."""
        return name in self._layouts and self._layouts[name].is_split

    def whole_shape(self, name: str, value: torch.Tensor) -> torch.Size:
        """Of the parameter or buffer of that name, of which this rank has `value`."""
        return self._layouts[name].shape if name in self._layouts else value.shape

    def is_block(self, name: str) -> bool:
        """Whether the share is one block of the whole; of matrices that were fused it has a part of each."""
        return all(getattr(placement, "split_factor", 1) == 1 for placement in self._layouts[name].placements)

    def describe(self, name: str, share: torch.Tensor) -> DTensor:
        """A share, or state of its shape, as the part of the whole that it is."""
        described: DTensor = self._as_dtensor(share, self._layouts[name])
        return described

    def whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The whole of which `value` is this rank's share: a parameter, or state of its shape. All shards call it."""
        if not self.is_split(name) or value.shape != self._layouts[name].local_shape(self._mesh.size()):
            return value
        full: torch.Tensor = self._as_dtensor(value.to(self._device), self._layouts[name]).full_tensor()
        return full

    def share(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's share of a whole parameter, or of state of its shape."""
        if not self.is_split(name) or whole.shape != self._layouts[name].shape:
            return whole
        layout = self._layouts[name]
        return distribute_tensor(whole.detach(), self._mesh, layout.placements, src_data_rank=None).to_local().clone()

    # A step ---------------------------------------------------------------------------------------------------------

    def same_random(self) -> None:
        """All shards go on with the first one's random numbers, so that dropout is the same where activations are."""
        source = dist.get_global_rank(self._group, 0)
        state = torch.get_rng_state().to(self._device)
        dist.broadcast(state, source, group=self._group)
        torch.set_rng_state(state.cpu())
        if self._device.type == "cuda":
            state = torch.cuda.get_rng_state(self._device).to(self._device)
            dist.broadcast(state, source, group=self._group)
            torch.cuda.set_rng_state(state.cpu(), self._device)

    def settle(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Sum partial gradients over the shards, and make those of whole parameters bit-equal."""
        sum_gradients([parameter for name, parameter in parameters if name in self._partial], self._group)
        take_first([p for name, p in parameters if name not in self._partial and not self.is_split(name)], self._group)
