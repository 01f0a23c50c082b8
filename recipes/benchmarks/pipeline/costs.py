"""What predictions are made of, measured in the invocation that checks them: costs of samples, links, optimizer.

In: the model and both processes. Out: a fitted `CostModel`, `Links` (seconds to send and to sum over the two
processes), seconds of clipping and the optimizer.

Both processes measure at the same time, so that they share caches and memory as they do in a step.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hf_dflop.cost import CostModel
from hf_dflop.pipeline import PipelineModel
from hf_dflop.pipeline.grads import sum_gradients
from recipes import finetune_vlm
from recipes.benchmarks.pipeline.ingredients import Ingredients, slowest
from recipes.demo.compare import fit, observe
from recipes.demo.settings import write_whole

__all__ = ["Costs", "Links", "both", "measure_links", "measure_optimizer"]

_REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Seconds between the two processes: latency and bytes a second; what the simulator asks of a network."""

    send_latency_s: float
    send_bytes_per_s: float
    sum_latency_s: float
    sum_bytes_per_s: float

    def send_s(self, num_bytes: Any, sender: Any, receiver: Any) -> Any:
        seconds = self.send_latency_s + np.asarray(num_bytes) / self.send_bytes_per_s
        return np.where(np.asarray(sender) == np.asarray(receiver), 0.0, seconds)

    def all_reduce_s(self, num_bytes: Any, ranks: Sequence[int]) -> Any:
        if len(ranks) < 2:
            return np.zeros_like(np.asarray(num_bytes, dtype=np.float64))
        seconds = self.sum_latency_s + np.asarray(num_bytes) / self.sum_bytes_per_s
        return np.where(np.asarray(num_bytes) > 0, seconds, 0.0)


class Costs:
    """Single microbatches of the whole model, measured again and again between the steps that they are to predict.

    The cores of a shared machine get faster and slower within minutes. Of every microbatch the mean counts, over all
    looks and both processes: a step is a sum of many of them, with the slow ones.
    """

    def __init__(self, ingredients: Ingredients) -> None:
        self._count = ingredients.settings.num_observations
        self._own = finetune_vlm.Ingredients(
            model=ingredients.master,
            processor=ingredients.collator.processor,
            collator=ingredients.collator,
            train=ingredients.rows,
            evaluation=None,
            profile=ingredients.profile,
        )
        self._looks: list[list[tuple[list[int], float]]] = []

    def look(self) -> None:
        """Measure all microbatches once, on both processes at the same time."""
        dist.barrier()
        told: list[Any] = [None, None]
        dist.all_gather_object(told, observe(self._own, self._count))
        self._looks += told

    def fitted(self) -> CostModel:
        """The cost model of all looks so far, the same on both processes."""
        same = zip(*self._looks, strict=True)
        return fit(self._own, [(looks[0][0], float(np.mean([s for _, s in looks]))) for looks in same])


def measure_links(path: Path) -> Links:
    """Sending and summing, small and large."""
    if not both(path.exists()):
        sends = _line([2**14, 2**18, 2**21], _ping)
        sums = _line([2**14, 2**22, 2**25], _sum)
        found = Links(
            send_latency_s=sends[0],
            send_bytes_per_s=sends[1],
            sum_latency_s=sums[0],
            sum_bytes_per_s=sums[1],
        )
        if dist.get_rank() == 0:
            write_whole(path, json.dumps(asdict(found)))
        dist.barrier()
    return Links(**json.loads(path.read_text(encoding="utf-8")))


def measure_optimizer(pipe: PipelineModel, optimizer: Any) -> list[float]:
    """Seconds of clipping and the optimizer on each process."""
    for parameter in pipe.parameters():
        parameter.grad = torch.zeros_like(parameter)
    own = []
    for _ in range(_REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        own.append(time.perf_counter() - begin)
        for parameter in pipe.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.zero_grad()
    told: list[Any] = [None, None]
    dist.all_gather_object(told, float(np.median(own)))
    return told


def _ping(size: int) -> Callable[[], None]:
    """There and back."""
    tensor = torch.zeros(size // 4)

    def run() -> None:
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        else:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)

    return run


def _sum(size: int) -> Callable[[], None]:
    """As the pipeline sums gradients, twice."""
    parameters = [torch.nn.Parameter(torch.zeros(size // 4 // 8)) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        for _ in range(2):
            sum_gradients(parameters, dist.group.WORLD)

    return run


def _line(sizes: Sequence[int], make: Callable[[int], Callable[[], None]]) -> tuple[float, float]:
    """Latency in seconds, and bytes a second, of half of what `make` runs; by least relative error."""
    seconds = []
    for size in sizes:
        run = make(size)
        run()
        seconds.append(float(np.median([slowest(run)[0] / 2 for _ in range(_REPEATS)])))
    times = np.array(seconds)
    columns = np.column_stack([np.ones(len(sizes)), np.array(sizes, dtype=float)]) / times[:, None]
    latency, per_byte = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    return max(float(latency), 1e-6), 1.0 / max(float(per_byte), 1e-13)


def both(value: bool) -> bool:
    """Whether it is so on both processes."""
    told: list[Any] = [None, None]
    dist.all_gather_object(told, value)
    return all(told)
