"""The groups of parts that are timed: encoder with connector, decoder, head, each built once and run on many sizes.

In: a shortened, built model and a size. Out: `Measurement`s. The stack of layers is cut to the depth that is wanted
at every run; all depths of a size are timed turn by turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_dflop.cost.measurement import Measurement
from hf_dflop.cost.parts import PartState
from hf_dflop.cost.spec import ModelSpec
from hf_dflop.profile.measure_build import layer_stack
from hf_dflop.profile.measure_grid import Size
from hf_dflop.profile.measure_parts import Call, catch_image_calls, float_tensors, is_variable, tile_lengths
from hf_dflop.profile.measure_shard import shard_head, shard_layers
from hf_dflop.profile.measure_time import Run, Timing, measure_bytes, time_runs

__all__ = ["DEPTHS", "HELD_OUT_DEPTHS", "DecoderGroup", "HeadGroup", "Setting", "VisionGroup"]

DEPTHS = (1, 3)
"""Layers of the two runs that tell a layer from what is fixed."""
HELD_OUT_DEPTHS = (2, 4)
"""Layers of the runs that are never fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is equal for all measurements of a group."""

    kind: int = 0
    tp: int = 1
    state: PartState = "trained"
    checkpointing: bool = False
    budget_s: float = 6.0
    """Seconds for one size."""


class _Stack:
    """The layers of a built module, to be cut and restored."""

    def __init__(self, module: nn.Module) -> None:
        self.owner, self.name = layer_stack(module, max(HELD_OUT_DEPTHS))
        self.layers: nn.ModuleList = getattr(self.owner, self.name)
        self._cuts = {depth: self.layers[:depth] for depth in (*DEPTHS, *HELD_OUT_DEPTHS)}

    def cut(self, depth: int) -> None:
        setattr(self.owner, self.name, self._cuts[depth])

    def restore(self) -> None:
        setattr(self.owner, self.name, self.layers)

    @property
    def parameters_per_layer(self) -> int:
        return sum(p.numel() for p in self.layers.parameters()) // len(self.layers)


def _prepare(module: nn.Module, model: Any, stack: _Stack, setting: Setting) -> None:
    """Train or freeze, recompute or not, as the setting says."""
    module.requires_grad_(setting.state == "trained")
    if setting.checkpointing:  # named so from transformers 5.20 on
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if setting.state == "passed":  # as enable_input_require_grads does: a gradient passes the frozen layers

        def require(_: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = hidden.detach().requires_grad_()
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        stack.layers[0].register_forward_pre_hook(require, with_kwargs=True)


def _measure(runs: Sequence[Run], device: torch.device, budget_s: float) -> list[tuple[Timing, tuple[float, float]]]:
    timings = time_runs(runs, device, budget_s=budget_s)
    return [(timing, measure_bytes(run, device)) for timing, run in zip(timings, runs, strict=True)]


def _record(
    group: str,
    setting: Setting,
    size: Size,
    tokens: int,
    timed: tuple[Timing, tuple[float, float]],
    *,
    depth: int = 0,
    copies: int = 1,
    held_out: bool,
) -> Measurement:
    timing, (kept, extra) = timed
    return Measurement(
        group=group,
        kind=setting.kind,
        tp=setting.tp,
        state=setting.state,
        checkpointing=setting.checkpointing,
        depth=depth,
        num_sequences=size.num_sequences,
        tokens=tokens,
        pairs=round(tokens * tokens / size.num_sequences),
        forward_s=timing.forward_s * copies,
        forward_spread_s=timing.forward_spread_s * copies,
        backward_s=timing.backward_s * copies,
        backward_spread_s=timing.backward_spread_s * copies,
        kept_bytes=kept * copies,
        extra_bytes=extra,
        num_repeats=timing.num_repeats,
        cpu_share=timing.cpu_share,
        held_out=held_out,
    )


class VisionGroup:
    """The encoder, and the connector beside it (timed at every size too, while `connector` is a setting)."""

    def __init__(self, model: Any, spec: ModelSpec, setting: Setting, connector: Setting | None) -> None:
        self.model, self.spec, self.setting, self.connector = model, spec, setting, connector
        self.device = next(model.parameters()).device
        self.encoder = model.get_encoder(modality="image")
        self.variable = is_variable(model)
        self.stack = _Stack(self.encoder)
        self.in_encoder = False
        self.connector_module: nn.Module | None = None
        probe = self._catch(Size(1, 64))
        self.tile_tokens = probe.tokens
        if setting.tp > 1:
            run = probe.encoder
            shard_layers(self.stack.layers, spec.vision, setting.tp, run, "vision encoder")
        _prepare(self.encoder, model, self.stack, setting)
        if probe.connector is not None and connector is not None:
            probe.connector.module.requires_grad_(connector.state == "trained")

    def _catch(self, size: Size) -> Any:
        self.stack.restore()
        grid = tile_lengths(self.spec, self.model.config, [size.length], variable=self.variable)[0]
        depth = len(self.stack.layers)
        parts = catch_image_calls(self.model, self.spec, grid, size.num_sequences, depth=depth, variable=self.variable)
        self.in_encoder = parts.in_encoder
        self.connector_module = parts.connector.module if parts.connector else None
        return parts

    def _run(self, call: Call, depth: int) -> Run:
        def run() -> Sequence[torch.Tensor]:
            self.stack.cut(depth)
            output = call()
            name = "pooler_output" if self.in_encoder else "last_hidden_state"
            chosen = getattr(output, name, None)
            return float_tensors(output if chosen is None else chosen)[:1]

        return run

    def at(self, size: Size, depths: Sequence[int], *, held_out: bool) -> tuple[Size, list[Measurement]]:
        """Measure a size; gives the size that it really had (grids are near squares) and the points."""
        parts = self._catch(size)
        really = Size(size.num_sequences, parts.tokens // size.num_sequences)
        runs = [self._run(parts.encoder, depth) for depth in depths]
        points = [
            _record("vision", self.setting, really, parts.tokens, timed, depth=depth, held_out=held_out)
            for depth, timed in zip(depths, _measure(runs, self.device, self.setting.budget_s), strict=True)
        ]
        if self.connector is not None and parts.connector is not None:
            call = parts.connector.detached(requires_grad=self.setting.state != "frozen")
            timed = _measure([lambda: float_tensors(call())[:1]], self.device, self.connector.budget_s)[0]
            copies = self.spec.connector.copies
            points.append(
                _record("connector", self.connector, really, parts.tokens, timed, copies=copies, held_out=held_out)
            )
        return really, points

    def num_parameters(self) -> dict[str, int]:
        self.stack.restore()
        layers = sum(p.numel() for p in self.stack.layers.parameters())
        connector = sum(p.numel() for p in self.connector_module.parameters()) if self.connector_module else 0
        fixed = sum(p.numel() for p in self.encoder.parameters()) - layers
        return {
            "vision_layer": self.stack.parameters_per_layer,
            "vision_fixed": fixed - (connector if self.in_encoder else 0),
            "connector": connector * self.spec.connector.copies,
        }


class DecoderGroup:
    """The LLM without its head, from embeddings on."""

    def __init__(self, model: Any, spec: ModelSpec, setting: Setting) -> None:
        self.model, self.spec, self.setting = model, spec, setting
        self.decoder = model.get_decoder()
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.stack = _Stack(self.decoder)
        if setting.tp > 1:
            call = self._call(Size(1, 16))
            shard_layers(self.stack.layers, spec.llm, setting.tp, call, "LLM")
        _prepare(self.decoder, model, self.stack, setting)

    def _call(self, size: Size) -> Call:
        shape = (size.num_sequences, size.length, self.spec.llm.hidden)
        embeds = torch.randn(shape, dtype=self.dtype, device=self.device)
        embeds.requires_grad_(self.setting.state != "frozen")
        return Call(module=self.decoder, kwargs={"inputs_embeds": embeds, "use_cache": False})

    def at(self, size: Size, depths: Sequence[int], *, held_out: bool) -> tuple[Size, list[Measurement]]:
        """Measure a size at some depths."""
        call = self._call(size)

        def runner(depth: int) -> Run:
            def run() -> Sequence[torch.Tensor]:
                self.stack.cut(depth)
                return float_tensors(call())[:1]

            return run

        timed = _measure([runner(depth) for depth in depths], self.device, self.setting.budget_s)
        return size, [
            _record("llm", self.setting, size, size.tokens, one, depth=depth, held_out=held_out)
            for depth, one in zip(depths, timed, strict=True)
        ]

    def num_parameters(self) -> dict[str, int]:
        self.stack.restore()
        layers = sum(p.numel() for p in self.stack.layers.parameters())
        embeddings = sum(p.numel() for p in self.decoder.get_input_embeddings().parameters())
        rest = sum(p.numel() for p in self.decoder.parameters()) - layers - embeddings
        return {
            "llm_layer": self.stack.parameters_per_layer,
            "llm_fixed": rest + embeddings // self.setting.tp,
        }


class HeadGroup:
    """LM head and loss, from hidden states on; every position has a label."""

    def __init__(self, model: Any, spec: ModelSpec, setting: Setting) -> None:
        self.model, self.spec, self.setting = model, spec, setting
        self.head = model.get_output_embeddings()
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        shard_head(self.head, setting.tp)
        self.head.requires_grad_(setting.state == "trained")

    def at(self, size: Size, depths: Sequence[int], *, held_out: bool) -> tuple[Size, list[Measurement]]:
        """Measure a size; `depths` does not matter."""
        vocab = self.head.weight.shape[0]
        hidden = torch.randn(1, size.tokens, self.head.weight.shape[1], dtype=self.dtype, device=self.device)
        hidden.requires_grad_(self.setting.state != "frozen")
        labels = torch.randint(vocab, (1, size.tokens), device=self.device)

        def run() -> Sequence[torch.Tensor]:
            logits = self.head(hidden)
            loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=vocab)
            return [loss, logits.detach()]  # the model returns its logits: they live until the backward has run

        timed = _measure([run], self.device, self.setting.budget_s)[0]
        return size, [_record("llm_head", self.setting, size, size.tokens, timed, held_out=held_out)]

    def num_parameters(self) -> dict[str, int]:
        return {"llm_head": int(self.head.weight.numel())}
