"""The numbers of a straggler report → a few sentences: is anything wrong, where, and what to do about it."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hf_dflop.integrations.report import StragglerReport

__all__ = ["verdict"]

_LITTLE = 0.03
_MUCH_DATA = 0.10
_MUCH_SYNC = 0.25
_OFF = 1.25
_OFTEN = 0.6


def usual_slowdown(report: "StragglerReport") -> float:
    """Measured ÷ predicted of the usual rank; of two the faster one."""
    known = sorted(rank.slowdown for rank in report.ranks if rank.slowdown == rank.slowdown)
    return known[(len(known) - 1) // 2] if known else 1.0


def verdict(report: "StragglerReport") -> list[str]:
    """Sentences, the most important first; the first one says how much is lost to waiting."""
    if report.slowest_rank is None:
        return ["Waiting was not measured: no gradient hook ran, as where parameters are sharded (FSDP, ZeRO-3)."]
    said = []
    at_least = "at least " if report.missing_ranks else ""
    waits = f"The mean rank waits for the slowest one {at_least}{report.idle_fraction:.1%} of each step"
    if len(report.ranks) < 2:
        said.append("Only one rank is here, so nobody waited for another.")
    elif report.idle_fraction < _LITTLE:
        said.append(f"{waits}: the ranks are well balanced.")
    else:
        said.append(f"{waits}.")
    usual = usual_slowdown(report)
    for rank in report.slow_ranks:
        where = f" (on {rank.host})" if rank.host else ""
        said.append(
            f"Rank {rank.rank}{where} is slow itself: it takes {rank.slowdown / usual:.2f} times as long as the usual "
            "rank for the same work. Look at its machine (clocks, temperature, neighbours), or give it less work with "
            'DflopCallback(slow_ranks="rebalance").'
        )
    often = max(report.ranks, key=lambda rank: rank.slowest_share)
    if len(report.ranks) > 1 and report.idle_fraction >= _LITTLE and not report.slow_ranks:
        if often.slowest_share >= _OFTEN:
            said.append(
                f"Rank {often.rank} is the last one in {often.slowest_share:.0%} of the steps: it got more work."
            )
        else:
            said.append("No rank is slow: the ranks take turns at being last, because of what their samples cost.")
    if report.factors is not None:
        (name, high), (other, low) = sorted(
            zip(("vision encoder", "LLM"), report.factors, strict=True), key=lambda pair: -pair[1]
        )
        if low > 0 and high / low >= _OFF:
            said.append(
                f"The {name} takes {high / low:.2f} times as long as predicted, compared with the {other}: costs that "
                "correct themselves (DflopCallback(correct=True)), or measured ones (CostModel.fit), balance better."
            )
    data = float(np.mean([rank.data_s for rank in report.ranks])) / report.step_s
    if data >= _MUCH_DATA:
        said.append(f"Loading data takes {data:.0%} of the step: use more dataloader workers.")
    if report.sync_s / report.step_s >= _MUCH_SYNC:
        said.append(
            f"Reducing gradients takes {report.sync_s / report.step_s:.0%} of the step even for the slowest rank: the "
            "network, and not the balance, is what limits it."
        )
    return said
