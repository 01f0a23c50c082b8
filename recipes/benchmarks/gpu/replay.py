"""The microbatches of every sampler, run rank after rank on one device.

In: settings, a model, its costs. Out: a row of kind `replay` for each mix, arm and round: what a step would take where
ranks meet once (the slowest rank's microbatches), what the mean rank would wait, and predicted beside measured seconds
of every microbatch.

Assumptions: ranks are equally fast; reducing gradients and the optimizer take the same in every arm and are left out.
Collating and copying to the device are not timed.
"""

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_dflop.cost import CostModel
from recipes.benchmarks.balancing.settings import ARMS, Arm, rotated
from recipes.benchmarks.common.results import Row, rounded
from recipes.benchmarks.common.samplers import Deal
from recipes.benchmarks.gpu.model import MicrobatchMaker, replay_shapes
from recipes.benchmarks.gpu.settings import GpuSettings
from recipes.benchmarks.scale.simulate import SIMULATED, Epoch
from recipes.demo.settings import write_whole

__all__ = ["DeviceClock", "replay", "step_seconds"]


class DeviceClock:
    """Points in time on the device: events on a GPU, so that launches run ahead; the monotonic clock elsewhere."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        """Wait until the device has done all."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def between(self, marks: list[Any]) -> list[float]:
        """Seconds from each mark to the next."""
        self.finish()
        pairs = itertools.pairwise(marks)
        return [begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin for begin, end in pairs]


def draw_epoch(mix: str, settings: GpuSettings, round_: int, cost: CostModel) -> Epoch:
    """The samples of a round with their measured costs."""
    shapes = replay_shapes(mix, settings, round_)
    return Epoch(
        shapes=shapes,
        vision_s=cost.vision_s(shapes),
        llm_s=cost.llm_s(shapes),
        num_ranks=settings.num_ranks,
        num_slots=settings.num_slots,
        batch_size=settings.batch_sizes[mix],
        num_steps=settings.num_steps,
        seed=settings.seed + round_,
    )


def step_seconds(slots: np.ndarray) -> tuple[float, float]:
    """Seconds of all steps, and the share of them that the mean rank waits, of `(steps, ranks, slots)` seconds."""
    ranks = slots.sum(axis=2)
    slowest = ranks.max(axis=1)
    return float(slowest.sum()), float((slowest - ranks.mean(axis=1)).sum() / slowest.sum())


class Replay:
    """Runs deals of a model's microbatches."""

    def __init__(self, settings: GpuSettings, model: Any, cost: CostModel) -> None:
        self.settings, self.model, self.cost = settings, model, cost
        self._maker = MicrobatchMaker(model, settings)
        self._clock = DeviceClock(settings.device)

    def run(self, epoch: Epoch, arm: Arm) -> dict[str, Any]:
        """One arm over the whole epoch; where a microbatch does not fit the memory, that is the result."""
        settings = self.settings
        deal = SIMULATED[arm.sampler](epoch, not arm.packed, "step")
        groups = _by_step(deal, settings.num_slots)
        predicted = np.array(
            [self.cost.microbatch_seconds(epoch.shapes, ranks, padded=not arm.packed) for ranks in _flat(groups)]
        ).reshape(len(groups), settings.num_ranks, settings.num_slots)
        if settings.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        measured = np.zeros_like(predicted)
        fits = True
        try:
            for step, ranks in enumerate(groups):
                tokens = int(epoch.shapes.label_tokens[[i for rank in ranks for group in rank for i in group]].sum())
                for rank, own in enumerate(ranks):
                    measured[step, rank] = self._rank_step(epoch, own, arm.packed, tokens)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            torch.cuda.empty_cache()
        lengths = epoch.shapes.llm_tokens
        computed = sum(
            int(lengths[group].sum()) if arm.packed else len(group) * int(lengths[group].max())
            for slots in deal
            for group in slots
        )
        seconds, waiting = step_seconds(measured) if fits else (None, None)
        predicted_s, predicted_waiting = step_seconds(predicted)
        return {
            "arm": arm.name,
            "sampler": arm.sampler,
            "packed": arm.packed,
            "fits": fits,
            "num_samples": len(epoch.shapes),
            "tokens": int(lengths.sum()),
            "computed_tokens": computed,
            "seconds": seconds,
            "waiting": waiting,
            "predicted_s": predicted_s,
            "predicted_waiting": predicted_waiting,
            "peak_memory_bytes": None if settings.device == "cpu" else torch.cuda.max_memory_allocated(),
            "predicted_measured_s": np.stack([predicted, measured], -1).reshape(-1, 2).tolist() if fits else [],
        }

    def _rank_step(self, epoch: Epoch, groups: list[list[int]], packed: bool, label_tokens: int) -> np.ndarray:
        """Seconds of forward and backward of a rank's microbatches, one after the other, `(slots,)`."""
        batches = [self._maker(epoch.shapes, group, packed=packed) for group in groups]
        divisor = torch.tensor(label_tokens, device=self.settings.device)
        found = []
        for _ in range(self.settings.num_repeats):
            self.model.zero_grad(set_to_none=False)  # every microbatch adds to gradients that are there
            self._clock.finish()
            marks = [self._clock.mark()]
            for batch in batches:
                self.model(**batch, num_items_in_batch=divisor).loss.backward()
                marks.append(self._clock.mark())
            found.append(self._clock.between(marks))
        return np.min(found, axis=0)


def _by_step(deal: Deal, num_slots: int) -> list[list[list[list[int]]]]:
    """step -> rank -> microbatch -> samples."""
    return [[slots[at : at + num_slots] for slots in deal] for at in range(0, len(deal[0]), num_slots)]


def _flat(groups: list[list[list[list[int]]]]) -> Iterable[list[list[int]]]:
    return (slots for ranks in groups for slots in ranks)


def replay(settings: GpuSettings, model: Any, cost: CostModel, mixes: Iterable[str], path: Path) -> dict[str, str]:
    """Run every arm of every mix; rows are kept in `path`, and what stands there is not run again.

    Returns:
        `dict[str, str]`: samplers that could not deal, and why.
    """
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {(row["mix"], row["round"], row["arm"]) for row in rows}
    runner = Replay(settings, model, cost)
    absent: dict[str, str] = {}
    for round_ in range(settings.num_rounds):
        for mix in mixes:
            epoch = draw_epoch(mix, settings, round_, cost)
            for arm in rotated(ARMS, round_, settings.num_rounds):
                if (mix, round_, arm.name) in done:
                    continue
                begin = time.monotonic()
                try:
                    run = runner.run(epoch, arm)
                except ImportError as error:  # a sampler that this transformers does not have
                    absent[arm.sampler] = str(error)
                    continue
                rows.append(rounded({"kind": "replay", "mix": mix, "round": round_, **run}))
                write_whole(path, json.dumps(rows))
                _say(settings, rows[-1], time.monotonic() - begin)
    return absent


def _say(settings: GpuSettings, row: Row, took_s: float) -> None:
    if row["fits"]:
        said = f"{row['num_samples'] / row['seconds']:.1f} samples/s, waiting {row['waiting']:.1%}"
    else:
        said = "does not fit the memory"
    place = f"{row['mix']}, round {row['round'] + 1} of {settings.num_rounds}, {row['arm']}"
    print(f"[bench] gpu: {place}: {said} ({took_s:.1f} s)", flush=True)
