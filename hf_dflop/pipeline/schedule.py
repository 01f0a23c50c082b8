"""An order of actions → torch.distributed.pipelining's schedule runtime, ready to run.

In: an `Order` (pipeline rank → actions), this rank's stages. Out: a runtime with sends and receives put in.

Assumption: stages that train nothing may have no backward in the order; torch wants one of each, so empty ones are
added, which send nothing.
"""

from collections.abc import Sequence

from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from hf_dflop.errors import PlanError
from hf_dflop.pipeline.recorder import NotedReceives, StepRecorder
from hf_dflop.pipeline.stage import RaggedStage
from hf_dflop.plan.actions import Action, Kind, Order

__all__ = ["fits_plan", "make_runtime", "note_receives"]


def fits_plan(order: Order, stage_columns: Sequence[int], num_microbatches: int) -> None:
    """Raises `PlanError` if the order is not one of these stages and microbatches."""
    if len(order) != max(stage_columns) + 1:
        raise PlanError(f"the order has {len(order)} pipeline ranks; the plan has {max(stage_columns) + 1}.")
    for column, actions in enumerate(order):
        for action in actions:
            if action.stage >= len(stage_columns) or stage_columns[action.stage] != column:
                raise PlanError(f"the order runs {action} on pipeline rank {column}; the plan has it elsewhere.")
            if action.microbatch >= num_microbatches:
                raise PlanError(f"the order runs {action}, but the step has {num_microbatches} microbatches.")


def make_runtime(stages: list[RaggedStage], order: Order, num_microbatches: int) -> _PipelineScheduleRuntime:
    """The runtime of this rank.

    Raises:
        PlanError: the order lacks actions, or ends in a deadlock.
    """
    runtime = _PipelineScheduleRuntime(list(stages), num_microbatches, loss_fn=None, scale_grads=False)
    actions: dict[int, list[_Action | None]] = {
        column: [_Action.from_str(str(action)) for action in line] for column, line in enumerate(_complete(order))
    }
    try:
        runtime._prepare_schedule_with_comms(actions)
    except AssertionError as error:
        raise PlanError(f"the order cannot be run: {str(error).splitlines()[0]}") from error
    return runtime


def note_receives(runtime: _PipelineScheduleRuntime, recorder: StepRecorder | None) -> None:
    """Tell `recorder` when the runtime begins to wait; between steps, when it waits for nothing."""
    for name in ("fwd_recv_ops", "bwd_recv_ops"):
        setattr(runtime, name, {} if recorder is None else NotedReceives(recorder))


def _complete(order: Order) -> Order:
    """The order with an empty backward for stages that have none."""
    with_backward = {action.stage for line in order for action in line if action.kind is not Kind.FORWARD}
    return [
        [
            *line,
            *(
                Action(action.stage, Kind.BACKWARD, action.microbatch)
                for action in line
                if action.kind is Kind.FORWARD and action.stage not in with_backward
            ),
        ]
        for line in order
    ]
