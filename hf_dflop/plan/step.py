"""One step of a plan, ready to be simulated: the samples of each microbatch, seconds, the order of actions.

In: a plan, a cost model, the shapes of a global batch. Out: a `PlannedStep`. The microbatches are composed by
`hf_dflop.balance.assign`, which the sampler runs too, and the order by `choose_order`.

Assumptions: see `stage_seconds`, `durations`, `network`. Without a `Communication` nothing that is sent takes time.
Gradients of a rank are reduced in one go. The pipeline engine does so when the last backward is done, and nothing of
it is hidden; DDP and FSDP do so beside the last backward, all but the last bucket, 25 MiB as in DDP. Which of them
runs a plan: where there is a pipeline (colocated, disjoint) its engine; a replicated plan is taken to run under DDP or
FSDP, unless the caller says that the pipeline engine runs it too (`by_pipeline`). FSDP gathers a module's parameters
in the forward and again in the backward, beside its computation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.balance import assign
from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.errors import PlanError
from hf_dflop.plan.actions import Order
from hf_dflop.plan.calibration import Calibration
from hf_dflop.plan.choose_order import WORK, choose_order
from hf_dflop.plan.durations import Durations
from hf_dflop.plan.network import Communication
from hf_dflop.plan.orders import make_order, stage_ranks
from hf_dflop.plan.plan import Plan
from hf_dflop.plan.stage_parts import stage_parameters
from hf_dflop.plan.stage_seconds import (
    Groups,
    SampleSeconds,
    StageSeconds,
    first_backward_stage,
    sample_seconds,
    stage_seconds,
)
from hf_dflop.shapes import Shapes

__all__ = [
    "PlannedStep",
    "compose_microbatches",
    "plan_stage_ranks",
    "plan_step",
    "rank_of_line",
    "reductions",
    "step_durations",
    "stock_groups",
]

BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedStep:
    """A step, ready to be simulated."""

    groups: Groups
    """LLM replica -> microbatch -> samples of the global batch."""
    order: Order
    """The actions, with the microbatches numbered as in `groups`."""
    durations: Durations
    llm_tokens: npt.NDArray[np.float64]
    """`(num_llm_replicas, num_microbatches)`, with padding."""
    image_tokens: npt.NDArray[np.float64]
    """`(num_llm_replicas, num_microbatches)`."""


def plan_stage_ranks(plan: Plan) -> tuple[int, ...]:
    """Pipeline rank of each stage of a plan: the encoder's stages, then the LLM's."""
    if plan.placement == "disjoint":
        return stage_ranks(
            plan.llm.pp,
            plan.llm.num_stages,
            num_vision_ranks=plan.vision.pp,
            num_vision_stages=plan.vision.num_stages,
        )
    return stage_ranks(plan.llm.pp, plan.llm.num_stages, colocated=True)


def stock_groups(num_samples: int, num_ranks: int, num_slots: int) -> list[list[npt.NDArray[np.int64]]]:
    """The microbatches as accelerate deals them: batches of the sampler's order go round the ranks."""
    parts = np.array_split(np.arange(num_samples), num_ranks * num_slots)
    return [[parts[slot * num_ranks + rank] for slot in range(num_slots)] for rank in range(num_ranks)]


def compose_microbatches(plan: Plan, seconds: SampleSeconds, *, seed: int = 0) -> Groups:
    """The samples of each microbatch, by the code that the sampler runs.

    Args:
        plan (`Plan`): `balance`, `placement` and replicas decide.
        seconds (`SampleSeconds`): of the global batch.
        seed (`int`): seed of the search, such as the step's number.

    Returns:
        replica -> microbatch -> samples.

    Raises:
        PlanError: fewer samples than microbatches.
    """
    num_samples = seconds.vision.size
    if num_samples < plan.llm.dp * plan.num_microbatches:
        raise PlanError(
            f"a global batch of {num_samples} samples cannot fill {plan.llm.dp} replicas × {plan.num_microbatches} "
            "microbatches; use a larger batch or fewer microbatches."
        )
    stock = stock_groups(num_samples, plan.llm.dp, plan.num_microbatches)
    if not plan.balance:
        return stock
    vision, llm = seconds.vision, seconds.llm
    if plan.placement == "replicated":
        objective = "step" if plan.fsdp_shards == 1 else "stage"
    else:  # seconds on the slowest stage of each
        objective = "pipeline"
        vision = vision * plan.llm.dp / plan.vision.dp / plan.vision.tp
        vision = vision * _largest(plan.vision.layers)
        llm = llm * _largest(plan.llm.layers) / plan.llm.tp
        if plan.placement == "colocated":  # one after the other on the first stage
            vision, llm = np.zeros_like(vision), vision + llm
    return assign(
        vision,
        llm,
        num_ranks=plan.llm.dp,
        num_slots=plan.num_microbatches,
        objective=objective,
        padded=plan.padded,
        baseline=stock,
        seed=seed,
    ).groups


def _largest(layers: tuple[int, ...]) -> float:
    return max(layers) / sum(layers) if sum(layers) else 1.0


def plan_step(
    plan: Plan,
    cost: CostModel,
    shapes: Shapes,
    *,
    communication: Communication | None = None,
    wire_bytes: int = 2,
    data_s: float = 0.0,
    optimizer_s: float = 0.0,
    calibration: Calibration | None = None,
    by_pipeline: bool | None = None,
    seed: int = 0,
    work: int = WORK,
) -> PlannedStep:
    """Compose, price and order one step.

    Args:
        plan (`Plan`): the layout.
        cost (`CostModel`): of the plan's model.
        shapes (`Shapes`): the samples of the global batch, in the sampler's order.
        communication (`Communication`, *optional*): a network or cluster; without it sending takes no time.
        wire_bytes (`int`): bytes of a number that is sent: activations and gradients.
        data_s (`float`): seconds from the step's begin until its first microbatch is there.
        optimizer_s (`float`): clipping and the optimizer.
        calibration (`Calibration`, *optional*): corrects the cost model, and the seconds that it has measured.
        by_pipeline (`bool`, *optional*):
            Whether the pipeline engine runs the plan, which sums gradients after the last backward, and not beside it
            as DDP does. By default it does where the plan has a pipeline.
        seed (`int`), work (`int`): of the searches, see `assign` and `choose_order`.

    Raises:
        PlanError: the plan is of another model, or the batch too small.
    """
    samples = sample_seconds(plan, cost, shapes)
    groups = compose_microbatches(plan, samples, seed=seed)
    stages = stage_seconds(plan, samples, shapes, groups)
    durations = step_durations(
        plan,
        cost,
        stages,
        communication=communication,
        wire_bytes=wire_bytes,
        data_s=data_s,
        optimizer_s=optimizer_s,
        calibration=calibration,
        by_pipeline=by_pipeline,
    )
    ranks, first = plan_stage_ranks(plan), first_backward_stage(plan)
    if plan.balance and plan.placement != "replicated":
        order = choose_order(
            durations, schedule=plan.schedule, stage_rank=ranks, first_backward_stage=first, seed=seed, work=work
        ).order
    else:
        order = make_order(
            plan.schedule,
            stage_rank=ranks,
            num_microbatches=plan.num_microbatches,
            first_backward_stage=first,
        )
    return PlannedStep(
        groups=groups,
        order=order,
        durations=durations,
        llm_tokens=stages.llm_tokens,
        image_tokens=stages.image_tokens,
    )


def step_durations(
    plan: Plan,
    cost: CostModel,
    stages: StageSeconds,
    *,
    communication: Communication | None = None,
    wire_bytes: int = 2,
    data_s: float = 0.0,
    optimizer_s: float = 0.0,
    calibration: Calibration | None = None,
    by_pipeline: bool | None = None,
) -> Durations:
    """`Durations` of microbatches whose stage seconds are known; takes what `plan_step` does."""
    given: dict[str, Any] = {}
    if plan.placement == "disjoint":
        given = {"bridge": plan.vision.num_stages - 1, "bridge_ranges": (stages.forward_from, stages.backward_from)}
    forward, backward = calibrated(plan, stages, calibration)
    if communication is not None:
        given |= _transfers(plan, cost, stages, communication, wire_bytes)
        after = plan.placement != "replicated" if by_pipeline is None else by_pipeline
        given |= reductions(plan, cost.spec, communication, wire_bytes, after=after)
        _add_collectives(plan, cost, stages, communication, wire_bytes, forward, backward)
    if calibration is not None:
        data_s = data_s if calibration.data_s is None else calibration.data_s
        optimizer_s = optimizer_s if calibration.optimizer_s is None else calibration.optimizer_s
        if calibration.reduce_s is not None:
            given |= {"reduce_s": calibration.reduce_s, "reduce_tail_s": calibration.reduce_s}
    given["data_ready_s"] = np.full((plan.vision.dp, plan.num_microbatches), data_s)
    return Durations.of(forward, backward, optimizer_s=optimizer_s, lockstep=plan.fsdp_shards, **given)


def calibrated(plan: Plan, stages: StageSeconds, calibration: Calibration | None) -> tuple[list[Any], list[Any]]:
    """Forward and backward of each stage with the corrections of a recorded run."""
    forward, backward = list(stages.forward), list(stages.backward)
    if calibration is None:
        return forward, backward
    for stage in range(len(forward)):
        module = "vision" if stage < plan.vision.num_stages else "llm"
        forward[stage] = calibration.apply(f"{module} forward", forward[stage])
        backward[stage] = calibration.apply(f"{module} backward", backward[stage])
    if calibration.microbatch_s:
        # of a whole microbatch: each stage and direction gets its share
        means = [(rows[stage].mean(), rows, stage) for stage in range(len(forward)) for rows in (forward, backward)]
        total = sum(mean for mean, _, _ in means)
        for mean, rows, stage in means:
            share = mean / total if total > 0 else 1.0 / len(means)
            rows[stage] = rows[stage] + calibration.microbatch_s * share * (rows[stage] > 0)
    return forward, backward


def rank_of_line(plan: Plan, pipeline_rank: int, replica: int) -> int:
    """The plan's rank (its first tensor-parallel shard) of a line of a `Timeline`."""
    return _rank(plan, plan_stage_ranks(plan).index(pipeline_rank), replica)


def _rank(plan: Plan, stage: int, replica: Any) -> Any:
    """The plan's rank of a stage (of all), its first shard; for one replica or an array of them."""
    num_vision = plan.vision.num_stages
    disjoint = plan.placement == "disjoint"
    if stage < num_vision and disjoint:
        return plan.vision.rank(stage=stage, replica=replica)
    first = plan.vision.num_ranks if disjoint else 0
    return first + plan.llm.rank(stage=max(0, stage - num_vision), replica=replica)


def _transfers(
    plan: Plan, cost: CostModel, stages: StageSeconds, communication: Communication, wire_bytes: int
) -> dict[str, Any]:
    """Seconds from stage to stage; tensor-parallel ranks send in parallel, each its share."""
    num_stages = plan.vision.num_stages + plan.llm.num_stages
    replicas = [plan.vision.dp] * plan.vision.num_stages + [plan.llm.dp] * plan.llm.num_stages
    ways: tuple[list[Any], list[Any]] = ([], [])
    for stage in range(num_stages - 1):
        inside = stage < plan.vision.num_stages - 1
        bridge = stage == plan.vision.num_stages - 1
        width = cost.spec.vision.hidden if inside else cost.spec.llm.hidden
        tp = plan.vision.tp if inside or bridge else plan.llm.tp
        for way, sender, receiver in ((0, stage, stage + 1), (1, stage + 1, stage)):
            count = replicas[sender]
            own = np.arange(count)[:, None]
            if inside or (bridge and way == 0):  # an encoder replica's share of all image tokens
                positions = stages.image_tokens.sum(axis=0, keepdims=True) / plan.vision.dp
                positions = positions * cost.spec.connector.merge if inside else positions
            elif bridge:
                positions = stages.image_tokens
            else:
                positions = stages.llm_tokens
            ends = (_rank(plan, sender, own), _rank(plan, receiver, own * replicas[receiver] // count))
            sent = communication.send_s(positions * (width * wire_bytes / tp), *ends)
            seconds = np.where(positions > 0, sent, 0.0)
            ways[way].append(seconds)
    return {"transfer_s": ways[0], "gradient_transfer_s": ways[1]} if num_stages > 1 else {}


def reductions(
    plan: Plan, spec: ModelSpec, communication: Communication, wire_bytes: int, *, after: bool
) -> dict[str, Any]:
    """Seconds of summing gradients, and of gathering and scattering parameters, as `Durations` takes them. `after`:
    the sums begin after the last backward, so that nothing of them is hidden."""
    ranks = plan_stage_ranks(plan)
    reduce_s = np.zeros(max(ranks) + 1)
    tail_s = np.zeros(max(ranks) + 1)
    floors = np.zeros((2, len(ranks)))
    held = stage_parameters(plan, spec)
    for rank in range(max(ranks) + 1):
        own = [stage for stage, at in enumerate(ranks) if at == rank]
        trained = sum(held[stage].trained for stage in own) * wire_bytes
        replicas = plan.llm.dp if own[-1] >= plan.vision.num_stages else plan.vision.dp
        first, stride = _rank(plan, own[-1], 0), (plan.llm if own[-1] >= plan.vision.num_stages else plan.vision).tp
        members = range(first, first + replicas * stride, stride)
        if plan.fsdp_shards > 1:
            # gathers and scatters in every microbatch, over the shards; copies of a shard are summed once
            for stage in own:
                shard = members[: plan.fsdp_shards]
                gather = communication.all_reduce_s(held[stage].all * wire_bytes, shard) / 2
                scatter = communication.all_reduce_s(held[stage].trained * wire_bytes, shard) / 2
                floors[:, stage] = gather, gather + scatter
            trained, members = trained / plan.fsdp_shards, members[:: plan.fsdp_shards]
        if not trained:
            continue
        reduce_s[rank] = communication.all_reduce_s(trained, members)
        last_bucket_s = communication.all_reduce_s(min(trained, BUCKET_BYTES), members)
        tail_s[rank] = reduce_s[rank] if after else min(reduce_s[rank], last_bucket_s)
    first, last = plan.vision.num_stages, len(ranks) - 1
    llm = spec.llm
    if llm.tied_embeddings and ranks[first] != ranks[last] and "llm" not in plan.frozen:
        # both copies of the embedding are summed at the step's end, when nothing hides it
        copy_bytes = llm.vocab * llm.hidden * wire_bytes / plan.llm.tp
        tied_s = communication.all_reduce_s(copy_bytes, [_rank(plan, stage, 0) for stage in (first, last)])
        for held_s in (reduce_s, tail_s):
            held_s[[ranks[first], ranks[last]]] += tied_s
    found: dict[str, Any] = {"reduce_s": reduce_s, "reduce_tail_s": tail_s}
    if plan.fsdp_shards > 1:
        found |= {"floor_forward_s": floors[0], "floor_backward_s": floors[1]}
    return found


def _add_collectives(
    plan: Plan,
    cost: CostModel,
    stages: StageSeconds,
    communication: Communication,
    wire_bytes: int,
    forward: list[Any],
    backward: list[Any],
) -> None:
    """Tensor parallelism: two all-reduces per layer forward and two backward, which nothing hides."""
    spec = cost.spec
    for stage in range(len(forward)):
        is_vision = stage < plan.vision.num_stages
        module = plan.vision if is_vision else plan.llm
        if module.tp == 1:
            continue
        number = module.layers[stage if is_vision else stage - plan.vision.num_stages]
        first = _rank(plan, stage, 0)
        shards = range(first, first + module.tp)
        width = spec.vision.hidden if is_vision else spec.llm.hidden
        if is_vision:
            images = stages.image_tokens.sum(axis=0, keepdims=True) * spec.connector.merge / plan.vision.dp
            positions = np.broadcast_to(images, forward[stage].shape)
        else:
            positions = stages.llm_tokens
        summed = communication.all_reduce_s(positions * (width * wire_bytes), shards)
        seconds = 2.0 * number * np.where(positions > 0, summed, 0.0)
        forward[stage] = forward[stage] + seconds
        if backward[stage].any():
            backward[stage] = backward[stage] + seconds * (2.0 if module.checkpointing else 1.0)
