"""Our orders against torch.distributed.pipelining's: the same actions on every rank, one after the other."""

import pytest
import torch.distributed.pipelining.schedules as torch_schedules

from hf_dflop.errors import PlanError
from hf_dflop.plan import Action, Order, dry_run, make_order, parse_order, stage_ranks

SIZES = [(2, 2), (2, 7), (3, 6), (4, 4), (4, 10), (5, 9)]


class _RecordingStage:
    """Stands where torch's schedule wants a stage; remembers what it was made to compute."""

    def __init__(self, stage_index: int, num_stages: int) -> None:
        self.stage_index, self.num_stages = stage_index, num_stages
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.ran: list[str] = []

    def forward_one_chunk(self, microbatch: int, *args: object, **kwargs: object) -> None:
        self.ran.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch: int, *args: object, **kwargs: object) -> None:
        self.ran.append(f"{self.stage_index}B{microbatch}")

    def get_fwd_recv_ops(self, microbatch: int) -> list[object]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, scale: int) -> None:
        pass


def _run_by_torch(kind: type, stage: int, num_stages: int, num_microbatches: int) -> list[str]:
    """What torch's own runtime computes on a rank."""
    schedule = kind.__new__(kind)
    schedule._n_microbatches, schedule._num_stages = num_microbatches, num_stages
    schedule._stage = _RecordingStage(stage, num_stages)
    schedule._has_backward = schedule.scale_grads = True
    schedule._check_inputs = lambda *args: ([()] * num_microbatches, [{}] * num_microbatches)
    for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
        setattr(schedule, name, lambda *args, **kwargs: None)
    schedule._step_microbatches()
    return schedule._stage.ran


def _planned_by_torch(kind: type, rank: int, num_ranks: int, num_chunks: int, num_microbatches: int) -> list[str]:
    schedule = kind.__new__(kind)
    schedule.pp_group_size, schedule.n_local_stages = num_ranks, num_chunks
    schedule._n_microbatches = num_microbatches
    schedule.number_of_rounds = max(1, num_microbatches // num_ranks)
    schedule.microbatches_per_round = num_microbatches // schedule.number_of_rounds
    return [str(action) for action in schedule._calculate_single_rank_operations(rank) if action is not None]


def _words(order: Order) -> list[list[str]]:
    return [[str(action) for action in rank] for rank in order]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
@pytest.mark.parametrize(
    ("schedule", "kind"), [("1f1b", torch_schedules.Schedule1F1B), ("gpipe", torch_schedules.ScheduleGPipe)]
)
def test_one_stage_per_rank(schedule: str, kind: type, num_ranks: int, num_microbatches: int) -> None:
    ours = make_order(schedule, stage_rank=range(num_ranks), num_microbatches=num_microbatches)
    assert _words(ours) == [_run_by_torch(kind, s, num_ranks, num_microbatches) for s in range(num_ranks)]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 2), (2, 6), (3, 6), (4, 3), (4, 10), (4, 16)])
@pytest.mark.parametrize(
    ("schedule", "kind", "num_chunks"),
    [
        # Interleaved with one stage per rank is 1F1B here; torch then keeps twice as many microbatches in flight.
        *[("interleaved", torch_schedules.ScheduleInterleaved1F1B, chunks) for chunks in (2, 3)],
        *[("zero-bubble", torch_schedules.ScheduleInterleavedZeroBubble, chunks) for chunks in (1, 2, 3)],
    ],
)
def test_dealt_round(schedule: str, kind: type, num_chunks: int, num_ranks: int, num_microbatches: int) -> None:
    stage_rank = stage_ranks(num_ranks, num_ranks * num_chunks)
    ours = make_order(schedule, stage_rank=stage_rank, num_microbatches=num_microbatches)
    theirs = [_planned_by_torch(kind, r, num_ranks, num_chunks, num_microbatches) for r in range(num_ranks)]
    assert _words(ours) == theirs


def _torch_dry_run(order: Order) -> list[list[str]]:
    """The computations of each rank as torch's dry run puts them in time; raises ValueError on a deadlock."""
    rank_of = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    computations = {r: [torch_schedules._Action.from_str(str(a)) for a in rank] for r, rank in enumerate(order)}
    with_transfers = torch_schedules._add_send_recv(computations, rank_of.__getitem__, len(rank_of))
    played = torch_schedules._simulate_comms_compute(with_transfers, rank_of.__getitem__, len(rank_of))
    return [[str(a) for a in played[r] if a is not None and a.is_compute_op] for r in sorted(played)]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble", "data-aware"])
@pytest.mark.parametrize("stage_rank", [(0, 1, 2), (0, 1, 0, 1), (0, 1, 2, 1, 2)])
def test_torch_plays_our_orders_to_the_end(schedule: str, stage_rank: tuple[int, ...]) -> None:
    order = make_order(schedule, stage_rank=stage_rank, num_microbatches=6)
    assert _torch_dry_run(order) == _words(order)
    assert sorted(dry_run(order)) == sorted(action for rank in order for action in rank)


def test_a_deadlock_is_found_by_both() -> None:
    order = make_order("1f1b", stage_rank=(0, 1), num_microbatches=3)
    first = order[0]
    first.insert(1, first.pop(first.index(Action.parse("0B0"))))  # waits for 1B0, which waits for 0F0: still runs
    dry_run(order)
    first.insert(0, first.pop(first.index(Action.parse("0B1"))))  # before its own forward
    with pytest.raises(PlanError, match="deadlock: rank 0 waits in 0B1 for 0F1; rank 1 waits in 1F0 for 0F0"):
        dry_run(order)
    with pytest.raises((ValueError, AssertionError)):
        _torch_dry_run(order)
    crossed = "0F0 0F1 0B1 0B0\n1F0 1B0 1F1 1B1"
    assert [len(rank) for rank in parse_order(crossed)] == [4, 4]  # gradients may wait
