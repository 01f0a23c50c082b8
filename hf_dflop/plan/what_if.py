"""What a change would buy: another node, a frozen encoder, half the batch, no recomputation allowed.

In: a `Planning`. Out: the best plan under each change, as samples per second: the planner is run again.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_dflop.errors import PlanError
from hf_dflop.plan.cluster import NodeGroup
from hf_dflop.plan.make_plan import describe_layout, make_plan
from hf_dflop.plan.plan import Plan
from hf_dflop.shapes import Shapes

if TYPE_CHECKING:
    from hf_dflop.plan.make_plan import Planning

__all__ = ["Change", "what_if", "what_if_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The best under a change."""

    name: str
    plan: Plan | None
    """None where nothing fits."""
    samples_per_s: float
    """0 where nothing fits."""


def what_if(planning: "Planning", shapes: Shapes | None = None) -> list[Change]:
    """The best plan under each change.

    Args:
        planning (`Planning`): what is changed.
        shapes (`Shapes`, *optional*): the dataset; by default the samples of the planning's own batches.
    """
    cluster, workload = planning.cluster, planning.scorer.workload
    groups = list(cluster.groups)
    groups[-1] = NodeGroup(nodes=groups[-1].nodes + 1, gpu=groups[-1].gpu)
    half = planning.global_batch_size // 2
    changes: dict[str, dict[str, object]] = {"one node more": {"cluster": replace(cluster, groups=tuple(groups))}}
    if "vision" not in workload.frozen:
        changes["encoder frozen"] = {"frozen": (*workload.frozen, "vision")}
    if half >= 1:
        changes["half the batch"] = {"global_batch_size": half}
    found = []
    for name, change in changes.items():
        arguments = {
            "cluster": cluster,
            "global_batch_size": planning.global_batch_size,
            "frozen": workload.frozen,
            "cached_features": workload.cached_features,
            "padded": workload.padded,
            "balance": planning.plan.balance,
            "constraints": planning.constraints,
            "cost_model": workload.cost,
            "memory": planning.scorer.rule,
            **change,
        }
        data = _joined(workload.batches) if shapes is None else shapes
        try:
            other = make_plan(planning.spec, data, **arguments)  # type: ignore[arg-type]
        except PlanError:
            found.append(Change(name=name, plan=None, samples_per_s=0.0))
            continue
        rate = other.global_batch_size / other.score.mean_s
        found.append(Change(name=name, plan=other.plan, samples_per_s=rate))
    return found


def what_if_text(planning: "Planning", changes: list[Change]) -> str:
    """One line per change."""
    ours = planning.global_batch_size / planning.score.mean_s
    lines = ["What a change would buy, in samples per second:"]
    for change in changes:
        if change.plan is None:
            lines.append(f"  {change.name}: nothing fits")
        else:
            lines.append(f"  {change.name}: {change.samples_per_s / ours:.2f}×, {describe_layout(change.plan)}")
    return "\n".join(lines)


def _joined(batches: list[Shapes]) -> Shapes:
    import numpy as np

    columns = [batch.to_columns() for batch in batches]
    return Shapes.from_columns({name: np.concatenate([column[name] for column in columns]) for name in columns[0]})
