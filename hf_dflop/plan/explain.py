"""A planning in words and in plain data: what won, what limits it, why others lost, what was ruled out, what it
costs."""

from typing import TYPE_CHECKING, Any

from hf_dflop.plan.cluster import Cluster
from hf_dflop.plan.make_plan import Score, describe_layout
from hf_dflop.plan.plan import Plan

if TYPE_CHECKING:
    from hf_dflop.plan.make_plan import Planning

__all__ = ["explain", "limits", "planning_dict", "seconds_text"]


def limits(planning: "Planning", plan: Plan | None = None) -> dict[str, float]:
    """Mean seconds per step of what bounds a plan: each module's compute on its ranks, and the rest.

    Returns:
        `dict`: `vision_s` and `llm_s` (of one GPU of the module), `other_s` (waiting, fill and drain, communication).
    """
    plan = plan or planning.plan
    workload = planning.scorer.workload
    vision, llm, head = workload.sums(plan.vision.checkpointing, plan.llm.checkpointing)[:, :3].mean(axis=0)
    seconds = float(planning.scorer.all_seconds(plan).mean())
    if plan.placement == "disjoint":
        vision_s = vision / plan.vision.num_ranks
        llm_s = (llm + head) / plan.llm.num_ranks
        return {"vision_s": vision_s, "llm_s": llm_s, "other_s": seconds - max(vision_s, llm_s)}
    vision_s, llm_s = vision / plan.num_ranks, (llm + head) / plan.num_ranks
    return {"vision_s": vision_s, "llm_s": llm_s, "other_s": seconds - vision_s - llm_s}


def _hours(planning: "Planning", score: Score) -> float:
    """GPU-hours of an epoch."""
    steps = planning.num_samples / planning.global_batch_size
    return score.mean_s * steps * planning.cluster.num_gpus / 3600


def seconds_text(seconds: float) -> str:
    """Three digits, with a unit that suits."""
    return f"{seconds:.3g} s" if abs(seconds) >= 1 else f"{1e3 * seconds:.3g} ms"


def _score_line(score: Score) -> str:
    low, high, most = seconds_text(score.low_s), seconds_text(score.high_s), seconds_text(score.p95_s)
    return (
        f"{seconds_text(score.mean_s)} a step ({low} to {high}; 95 % below {most}), "
        f"GPUs compute {1 - score.idle_fraction:.0%} of it, {score.peak_bytes / 2**30:.1f} GiB at most"
    )


def explain(planning: "Planning") -> str:
    """Several paragraphs of plain text."""
    plan, score, result, cluster = planning.plan, planning.score, planning.result, planning.cluster
    parts = limits(planning)
    largest = "encoder" if parts["vision_s"] > parts["llm_s"] else "LLM"
    lines = [
        f"Best on {cluster.num_gpus} GPUs ({_gpu_names(cluster)}), {planning.global_batch_size} samples a step:",
        f"  {describe_layout(plan)}",
        f"  {_score_line(score)}",
        f"  layers of each stage: vision {list(plan.vision.layers)}, LLM {list(plan.llm.layers)}",
        f"  per step a GPU of the encoder computes {seconds_text(parts['vision_s'])}, of the LLM "
        f"{seconds_text(parts['llm_s'])}; {seconds_text(parts['other_s'])} are waiting, fill and drain, and "
        f"communication. The {largest} limits it.",
    ]
    hours = _hours(planning, score)
    cost = ""
    if cluster.price_per_gpu_hour is not None:
        cost = f", {hours * cluster.price_per_gpu_hour:,.2f} at {cluster.price_per_gpu_hour:g} per GPU-hour"
    lines.append(f"  an epoch of {planning.num_samples:,} samples takes {hours:,.2f} GPU-hours{cost}")
    if planning.rivals:
        lines.append("\nSlower:")
        for kind, other, theirs in planning.rivals:
            name = "" if kind == "next" else f"best {kind}: "
            lines.append(
                f"  {theirs.mean_s / score.mean_s:.2f}×  {name}{describe_layout(other)}: "
                f"{_why(planning, other, theirs)}"
            )
    lines.append(
        f"\nOf {result.num_layouts:,} layouts {result.num_bounded:,} were ruled out by a bound on their seconds, "
        "the others by what follows, or plan by plan."
    )
    for reason, count in result.rejected.most_common():
        lines.append(f"  {count:,} ruled out by {reason}")
    if planning.constraints:
        lines.append(f"  constraints: {', '.join(planning.constraints)}")
    if planning.spec.assumptions:
        lines.append("Assumed of the model: " + " ".join(planning.spec.assumptions))
    return "\n".join(lines)


def _gpu_names(cluster: Cluster) -> str:
    return ", ".join(f"{group.nodes} × {cluster.gpus_per_node} {group.gpu.name}" for group in cluster.groups)


def _why(planning: "Planning", plan: Plan, score: Score) -> str:
    """What the plan loses against the winner, in half a sentence."""
    ours, theirs = limits(planning), limits(planning, plan)
    losses = {
        "waits and communicates more": theirs["other_s"] - ours["other_s"],
        "its encoder ranks compute longer": theirs["vision_s"] - ours["vision_s"],
        "its LLM ranks compute longer": theirs["llm_s"] - ours["llm_s"],
    }
    reason, seconds = max(losses.items(), key=lambda item: item[1])
    return f"{reason} (by {seconds_text(seconds)})" if seconds > 0 else "about the same"


def planning_dict(planning: "Planning") -> dict[str, Any]:
    """Plain JSON types: the plan, its score, the rivals, what was ruled out."""

    def score_dict(score: Score) -> dict[str, float]:
        return {
            "step_s": score.mean_s,
            "step_s_low": score.low_s,
            "step_s_high": score.high_s,
            "step_s_p95": score.p95_s,
            "idle_fraction": score.idle_fraction,
            "peak_bytes": score.peak_bytes,
        }

    hours = _hours(planning, planning.score)
    price = planning.cluster.price_per_gpu_hour
    return {
        "plan": planning.plan.to_dict(),
        "score": score_dict(planning.score),
        "limits": {name: float(value) for name, value in limits(planning).items()},
        "gpu_hours_per_epoch": hours,
        "price_per_epoch": None if price is None else hours * price,
        "rivals": [
            {"kind": kind, "layout": describe_layout(plan), "plan": plan.to_dict(), "score": score_dict(score)}
            for kind, plan, score in planning.rivals
        ],
        "num_layouts": planning.result.num_layouts,
        "num_bounded": planning.result.num_bounded,
        "rejected": dict(planning.result.rejected),
        "constraints": list(planning.constraints),
    }
