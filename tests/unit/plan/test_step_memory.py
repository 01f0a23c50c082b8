"""Bytes of a plan's ranks: parameters are all there once, and what is in flight comes on top."""

import numpy as np
import pytest

from hf_dflop.cost.memory import MemorySettings, StageLayers, stage_memory
from hf_dflop.plan import ModulePlan, plan_step, simulate_order
from hf_dflop.plan.compiled import compile_schedule
from hf_dflop.plan.fit_memory import put_off
from hf_dflop.plan.orders import make_order
from hf_dflop.plan.simulate import most_in_flight
from hf_dflop.plan.stage_parts import stage_parameters
from hf_dflop.plan.step_memory import step_memory
from tests.unit.plan import example


def test_all_parameters_are_somewhere() -> None:
    whole = stage_memory(example.spec(), StageLayers.whole(example.spec()), MemorySettings(dtype="float32"))
    for plan in (example.plan(), example.replicated(), example.plan(vision=ModulePlan(layers=(2, 4)))):
        held = stage_parameters(plan, example.spec())
        assert 4 * sum(stage.all for stage in held) == pytest.approx(whole.parameters_bytes)
        assert sum(stage.trained for stage in held) == sum(stage.all for stage in held)
    frozen = stage_parameters(example.plan(frozen=("vision", "connector")), example.spec())
    assert [stage.trained > 0 for stage in frozen] == [False, True, True]


def test_peak_of_a_pipeline() -> None:
    plan, data = example.plan(schedule="1f1b", balance=False), example.shapes(48)
    step = plan_step(plan, example.cost(), data)
    memory = step_memory(plan, example.spec(), data, step.groups)
    timeline = simulate_order(step.order, step.durations, activation_bytes=memory.kept)
    peaks = dict(zip(timeline.lines, memory.peak_bytes(timeline), strict=True))
    # the last stage has one microbatch in flight
    kept, extra = memory.kept[2][1], memory.extra[2][1]
    assert peaks[2, 1] == pytest.approx(memory.static[2] + kept.max() + extra.max())
    # the first LLM stage two, in turn
    assert peaks[1, 0] == pytest.approx(
        memory.static[1]
        + max(kept + later for kept, later in zip(memory.kept[1][0], memory.kept[1][0][1:], strict=False))
        + memory.extra[1][0].max()
    )
    checkpointed = example.plan(llm=ModulePlan(layers=(4, 4), dp=3, checkpointing=True))
    less = step_memory(checkpointed, example.spec(), data, step.groups)
    assert (less.kept[1] < memory.kept[1]).all()
    assert np.isfinite(less.static).all()


def test_zero_bubble_holds_gradients_between_the_parts_of_a_backward() -> None:
    order = make_order("zero-bubble", stage_rank=(0, 1, 2), num_microbatches=6)
    held = [np.ones((1, 6))] * 3
    plain, split = most_in_flight(order, held), most_in_flight(order, held, [np.full((1, 6), 0.5)] * 3)
    assert (split > plain).all()
    waiting = put_off(compile_schedule("zero-bubble", (0, 1, 2), 6))
    assert (split <= plain + 0.5 * np.maximum(waiting, [6, 0, 0])).all()  # at the same time at the worst
    assert waiting[0] == 0  # nothing enters the first stage: its backward is not split
    assert waiting[1:].min() >= 1
    assert not put_off(compile_schedule("1f1b", (0, 1, 2), 6)).any()
