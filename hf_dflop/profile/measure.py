"""Measures what a model costs on this machine: seconds and bytes of each of its parts over a grid of sizes.

In: a model (its config is enough: weights are random), a device, a number format, what is trained. Out: a
`ModelProfile`. Only a few layers are ever built; two depths tell what a layer takes and what is fixed, and a third
depth at random sizes, never fitted, tells how far the result is off.

Assumptions: seconds depend on sizes, not on weights or pixels (a mixture of experts is measured with the balance that
random weights give); attention runs on whole rows without a padding mask; ranks of a tensor-parallel group are timed
without the communication between them.
"""

import gc
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_dflop.cost.flops import Trainable
from hf_dflop.cost.measurement import Direction, Measurement, group_curves
from hf_dflop.cost.model_profile import ModelProfile
from hf_dflop.cost.parts import part_states
from hf_dflop.cost.spec import ModelSpec
from hf_dflop.errors import ModelError
from hf_dflop.profile.measure_grid import Size, first_sizes, held_out_sizes, refine
from hf_dflop.profile.measure_progress import MeasureProgress

__all__ = ["measure_model"]

MODULES = ("vision", "connector", "llm")


_MAX_LOOKS = 3
"""How often a disturbed size is measured again."""
_Look = tuple[Size, Sequence[int], bool, list[Measurement]]
"""A size, its depths, whether it is held out, what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """How many sizes, how large, how precise."""

    max_tokens: int
    max_patches: int
    max_points: int
    num_held_out: int
    target: float
    budget_s: float
    seed: int


def measure_model(
    model: Any,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str = "sdpa",
    tp: int | Sequence[int] = 1,
    frozen: Sequence[str] = (),
    activation_checkpointing: bool | Literal["both"] = False,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    max_points: int = 10,
    num_held_out: int = 6,
    target: float = 0.03,
    budget_s: float = 60.0,
    seed: int = 0,
    progress: bool | None = None,
) -> ModelProfile:
    """Measure forward and backward seconds and activation bytes of encoder, connector, LLM and LM head.

    Args:
        model (`str`, `PreTrainedConfig` or `dict`):
            A Hub id, a local folder, a JSON file of a config, or the config. Weights are never loaded.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        device (`str`, *optional*): as torch names it; the GPU if there is one.
        dtype (`str`, *optional*): `"bfloat16"` by default on a GPU, `"float32"` on a CPU.
        attn_implementation (`str`, defaults to `"sdpa"`): as transformers names it.
        tp (`int` or sequence, defaults to 1): tensor-parallel degrees; one rank's shard is timed for each.
        frozen (sequence of `str`): modules that are not trained: of `"vision"`, `"connector"`, `"llm"`.
        activation_checkpointing (`bool` or `"both"`, defaults to `False`): layers are recomputed in the backward.
        max_tokens (`int`, *optional*): largest LLM microbatch; 8,192 on a GPU, 2,048 on a CPU.
        max_patches (`int`, *optional*): largest encoder microbatch; `max_tokens`, twice that if patches are merged.
        max_points (`int`, defaults to 10): sizes of each group at most; it stops earlier when well predicted.
        num_held_out (`int`, defaults to 6): random sizes of each group that are never fitted.
        target (`float`, defaults to 0.03): relative error at which no more sizes are added.
        budget_s (`float`, defaults to 60): seconds for the sizes of one group, held-out ones beside it.
        seed (`int`, defaults to 0): of the random sizes.
        progress (`bool`, *optional*): show a progress bar; by default where someone watches.

    Returns:
        [`ModelProfile`]: with `error` on held-out points.

    Raises:
        ModelError: the config is not one of a vision-language model, a part is not found by structure, a degree does
            not divide, or an option is not one of those named.
    """
    import torch

    from hf_dflop.profile.measure_build import layer_kinds, load_config

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(f"device is {device!r}, but torch sees no GPU here; use device='cpu'.")
        if place.index is not None:
            torch.cuda.set_device(place)  # events are recorded on the streams of the current device
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"dtype is {dtype!r}; use bfloat16, float16, float32 or float64.")
    if unknown := set(frozen) - set(MODULES):
        raise ModelError(f"frozen names {sorted(unknown)}; the modules are {', '.join(MODULES)}.")
    config = load_config(model, revision=revision)
    spec = ModelSpec.from_config(config)
    if not spec.takes_images:
        raise ModelError(
            "the model takes sounds and no images; an audio encoder is not measured. Leave out cost_model."
        )
    degrees = sorted({tp} if isinstance(tp, int) else set(tp))
    _check_degrees(spec, degrees)
    grid = _grid(spec, place.type, max_tokens, max_patches, max_points, num_held_out, target, budget_s, seed)
    recompute = [False, True] if activation_checkpointing == "both" else [bool(activation_checkpointing)]
    trainable = Trainable(**{module: module not in frozen for module in MODULES})
    kinds = {module: layer_kinds(config, module) for module in ("vision", "llm")}

    points: list[Measurement] = []
    counted: dict[str, dict[str, int]] = {}
    num_groups = len(degrees) * (len(recompute) * sum(len(found) for found in kinds.values()) + 1)
    in_encoder = False
    with MeasureProgress(num_groups * (grid.max_points + grid.num_held_out), show=progress) as bar:
        for title, group in _groups(
            config, spec, kinds, degrees, recompute, trainable, dtype, attn_implementation, place, grid
        ):
            bar.begin(title)
            try:
                points += _measure_group(group, spec, grid, bar)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{title}: a microbatch does not fit the memory of {place}. Choose a smaller max_tokens than "
                    f"{grid.max_tokens}, or max_patches than {grid.max_patches}."
                ) from error
            in_encoder = in_encoder or getattr(group, "in_encoder", False)
            _count(group, counted)
            bar.end(grid.max_points + grid.num_held_out)
            del group
            gc.collect()
            if place.type == "cuda":
                torch.cuda.empty_cache()
    return ModelProfile(
        spec=spec,
        model=str(model)[:200] if isinstance(model, str | Path) else config.model_type,
        device=_device_name(place),
        dtype=dtype,
        attention=attn_implementation,
        versions={name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        num_threads=torch.get_num_threads() if place.type == "cpu" else 0,
        layer_kinds={module: tuple(kind.num_layers for kind in found) for module, found in kinds.items()},
        connector_in_encoder=in_encoder,
        num_parameters=_mean_layers(counted, kinds),
        notes=_notes(spec, degrees, points),
        measurements=tuple(points),
    )


def _count(group: Any, counted: dict[str, dict[str, int]]) -> None:
    """Note the parameters of a group: of layers by degree and kind, of the rest by degree."""
    for part, count in group.num_parameters().items():
        degree = str(group.setting.tp)
        counted.setdefault(part, {})[f"{degree} {group.setting.kind}" if part.endswith("_layer") else degree] = count


def _check_degrees(spec: ModelSpec, degrees: Sequence[int]) -> None:
    from hf_dflop.profile.measure_shard import check_degree

    for degree in degrees:
        if degree < 1:
            raise ModelError(f"tp={degree}; a tensor-parallel degree is at least 1.")
        check_degree(spec.vision, "vision encoder", degree)
        check_degree(spec.llm, "LLM", degree)


def _grid(
    spec: ModelSpec,
    kind: str,
    max_tokens: int | None,
    max_patches: int | None,
    max_points: int,
    num_held_out: int,
    target: float,
    budget_s: float,
    seed: int,
) -> _Grid:
    tokens = max_tokens or (8192 if kind == "cuda" else 2048)
    patches = max_patches or tokens * min(spec.connector.merge, 2)
    if min(tokens, patches) < 64 or max_points < 4 or num_held_out < 0 or not target > 0 or not budget_s > 0:
        raise ModelError(
            f"max_tokens={tokens}, max_patches={patches}, max_points={max_points}, num_held_out={num_held_out}, "
            f"target={target}, budget_s={budget_s}: at least 64 tokens and patches and 4 points are needed."
        )
    return _Grid(
        max_tokens=tokens,
        max_patches=patches,
        max_points=max_points,
        num_held_out=num_held_out,
        target=target,
        budget_s=budget_s,
        seed=seed,
    )


def _groups(
    config: Any,
    spec: ModelSpec,
    kinds: dict[str, Any],
    degrees: Sequence[int],
    recompute: Sequence[bool],
    trainable: Trainable,
    dtype: str,
    attention: str,
    place: Any,
    grid: _Grid,
) -> Iterator[tuple[str, Any]]:
    """Every group to measure, built when its turn comes, with a title for the progress bar."""
    from hf_dflop.profile.measure_build import build, shortened
    from hf_dflop.profile.measure_group import HELD_OUT_DEPTHS, DecoderGroup, HeadGroup, Setting, VisionGroup

    depth = max(HELD_OUT_DEPTHS)
    each_s = grid.budget_s / grid.max_points
    for degree in degrees:
        for again in recompute:
            states = part_states(trainable, checkpointing=again)
            suffix = (f", tp={degree}" if degree > 1 else "") + (", checkpointed" if again else "")
            for module in ("vision", "llm"):
                for index, kind in enumerate(kinds[module]):
                    short = shortened(config, module, depth=depth, layer=kind.layer)
                    model = build(short, dtype=dtype, attention=attention, device=place)
                    setting = Setting(
                        kind=index, tp=degree, state=states[f"{module}_layer"], checkpointing=again, budget_s=each_s
                    )
                    title = f"{module} layers" + (f" {index + 1}" if len(kinds[module]) > 1 else "") + suffix
                    if module == "vision":
                        first = degree == degrees[0] and again == recompute[0] and index == 0
                        connector = Setting(state=states["connector"], budget_s=each_s / 4) if first else None
                        yield title, VisionGroup(model, spec, setting, connector)
                    else:
                        yield title, DecoderGroup(model, spec, setting)
                    del model
        short = shortened(config, "llm", depth=1, layer=0)
        state = part_states(trainable, checkpointing=recompute[0])["llm_head"]
        model = build(short, dtype=dtype, attention=attention, device=place)
        yield (
            "LM head" + (f", tp={degree}" if degree > 1 else ""),
            HeadGroup(model, spec, Setting(tp=degree, state=state, budget_s=each_s)),
        )
        del model


def _measure_group(group: Any, spec: ModelSpec, grid: _Grid, bar: MeasureProgress) -> list[Measurement]:
    """Fitted points, then held-out ones."""
    from hf_dflop.profile.measure_group import DEPTHS, HELD_OUT_DEPTHS, HeadGroup, VisionGroup

    vision = isinstance(group, VisionGroup)
    variable = group.variable if vision else not isinstance(group, HeadGroup)
    largest = grid.max_patches if vision else grid.max_tokens
    shortest = max(min(64, largest // 16), 16)
    if vision and not variable:
        shortest = group.tile_tokens
        largest = max(largest, 4 * shortest)
    elif not variable:  # the head: any number of positions, one by one
        shortest = 32
    layered = not isinstance(group, HeadGroup)
    began = time.monotonic()
    by_size: dict[Size, list[Measurement]] = {}

    def measure(size: Size) -> Size:
        really, points = group.at(size, DEPTHS, held_out=False)
        by_size[really] = points
        bar.step()
        return really

    def fitted(sizes: Sequence[Size]) -> list[Measurement]:
        main = "vision" if vision else "llm" if layered else "llm_head"
        return [point for size in sizes for point in by_size[size] if point.group == main]

    def error(size: Size, others: Sequence[Size]) -> float:
        return max(_error(fitted(others), point) for point in fitted([size]))

    told = refine(
        first_sizes(min_length=shortest, max_tokens=largest, variable=variable),
        measure,
        lambda size: error(size, [other for other in by_size if other != size]),
        lambda sizes: [error(size, [other for other in sizes if other != size]) for size in sizes],
        target=grid.target,
        max_points=grid.max_points,
        is_over=lambda: time.monotonic() - began > grid.budget_s,
    )
    bar.told(told)
    rng = np.random.default_rng([grid.seed, group.setting.kind, group.setting.tp])
    held = held_out_sizes(min_length=shortest, max_tokens=largest, variable=variable, count=grid.num_held_out, rng=rng)
    looks: list[_Look] = [(size, DEPTHS, False, points) for size, points in by_size.items()]
    for index, size in enumerate(held):
        depths: tuple[int, ...] = (HELD_OUT_DEPTHS[index % len(HELD_OUT_DEPTHS)],)
        looks.append((size, depths, True, group.at(size, depths, held_out=True)[1]))
        bar.step()
    return _look_again(group, looks, grid, bar)


def _look_again(group: Any, looks: Sequence[_Look], grid: _Grid, bar: MeasureProgress) -> list[Measurement]:
    """Measure disturbed sizes again, fitted and held-out alike, and keep the calmer of two looks, which is the faster
    one: what disturbs only adds time."""
    began = time.monotonic()
    kept: list[Measurement] = []
    disturbed = 0
    for size, depths, held_out, points in looks:
        found = points
        for _ in range(_MAX_LOOKS):
            if not any(point.is_disturbed for point in found) or time.monotonic() - began > grid.budget_s:
                break
            again = group.at(size, depths, held_out=held_out)[1]
            found = [min(pair, key=lambda point: point.total_s) for pair in zip(found, again, strict=True)]
        disturbed += any(point.is_disturbed for point in found)
        kept += found
    bar.told_disturbed(disturbed)
    return kept


def _error(points: Sequence[Measurement], point: Measurement) -> float:
    """How far curves through `points` are from forward + backward of `point`, relative."""
    if not points:
        return math.inf
    directions: tuple[Direction, ...] = ("forward", "backward")
    predicted = 0.0
    for direction in directions:
        layer, fixed = group_curves(tuple(points), direction)
        predicted += float(fixed.at(point.tokens, point.pairs)[0])
        predicted += point.depth * float(layer.at(point.tokens, point.pairs)[0])
    measured = point.forward_s + point.backward_s
    return abs(predicted - measured) / measured


def _mean_layers(counted: dict[str, dict[str, int]], kinds: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Parameters of a mean layer out of those of each kind."""
    result: dict[str, dict[str, int]] = {}
    for part, by_setting in counted.items():
        if not part.endswith("_layer"):
            result[part] = by_setting
            continue
        numbers = [kind.num_layers for kind in kinds[part.removesuffix("_layer")]]
        result[part] = {}
        for degree in dict.fromkeys(key.split()[0] for key in by_setting):
            total = sum(number * by_setting[f"{degree} {kind}"] for kind, number in enumerate(numbers))
            result[part][degree] = round(total / sum(numbers))
    return result


def _device_name(place: Any) -> str:
    import torch

    if place.type == "cuda":
        return f"{torch.cuda.get_device_name(place)}, CUDA {torch.version.cuda}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found = platform.processor() or platform.machine()
    return f"{found}, {os.cpu_count()} cores"


def _notes(spec: ModelSpec, degrees: Sequence[int], points: Sequence[Measurement]) -> tuple[str, ...]:
    notes = list(spec.assumptions)
    if max(degrees) > 1:
        notes.append("tensor-parallel shards were timed alone, without communication")
    if not any(point.group == "connector" for point in points):
        notes.append("no connector was found by structure: it is priced by its FLOPs")
    if disturbed := sum(point.is_disturbed for point in points):
        notes.append(
            f"{disturbed} of {len(points)} measurements scatter, or others had the CPU: measure on a calm machine"
        )
    if spec.connector.copies > 1:
        notes.append(
            f"one of {spec.connector.copies} equal connectors was timed and counted {spec.connector.copies} times"
        )
    return tuple(notes)
