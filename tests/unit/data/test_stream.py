"""A stream's microbatches: the stock steps regrouped, the same for any number of workers, exact after a resume."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from hf_dflop.cost import CostModel, ModelSpec
from hf_dflop.data.rows_of_stream import RowReader
from hf_dflop.data.step_plan import Caps
from hf_dflop.data.stream import BalancedStream
from hf_dflop.errors import BalanceError, DatasetError
from tests.distributed import tiny
from tests.distributed.chats import conversations

COST = CostModel.analytic(ModelSpec.from_config(tiny.model().config))
ROWS, _ = tiny.rows(90)


def stream_of(num_shards: int = 1, shuffled: bool = False) -> Any:
    stream = ROWS.to_iterable_dataset(num_shards=num_shards)
    return stream.shuffle(seed=3, buffer_size=16) if shuffled else stream


def build(source: Any = None, rank: int = 0, **kwargs: Any) -> BalancedStream:
    settings: dict[str, Any] = {"num_ranks": 2, "num_slots": 2, "batch_size": 4, "padded": False}
    return BalancedStream(stream_of() if source is None else source, COST, rank=rank, **(settings | kwargs))


def ids(microbatches: Any) -> list[list[int]]:
    return [[row["id"] for row in rows] for rows in microbatches]


def steps(source: Any = None, num_ranks: int = 2, num_slots: int = 2, **kwargs: Any) -> list[list[int]]:
    """The sorted ids of every step, over all ranks."""
    per_rank = [
        ids(build(source, rank, num_ranks=num_ranks, num_slots=num_slots, **kwargs)) for rank in range(num_ranks)
    ]
    assert len({len(microbatches) for microbatches in per_rank}) == 1
    return [
        sorted(i for own in per_rank for group in own[k : k + num_slots] for i in group)
        for k in range(0, len(per_rank[0]), num_slots)
    ]


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_step_has_the_rows_that_come_next(shuffled: bool) -> None:
    order = [row["id"] for row in stream_of(shuffled=shuffled)]
    expected = [sorted(order[k : k + 16]) for k in range(0, 80, 16)]  # the last 10 rows fill no step
    assert steps(stream_of(shuffled=shuffled)) == expected
    grouped = ids(build(stream_of(shuffled=shuffled)))
    assert grouped != ids(build(stream_of(shuffled=shuffled), balance=False))
    assert {len(group) for group in grouped} != {4}


def test_the_stock_grouping_is_how_accelerate_deals_a_stream() -> None:
    from accelerate.data_loader import IterableDatasetShard

    for rank in range(2):
        dealt = [row["id"] for row in IterableDatasetShard(stream_of(), 4, num_processes=2, process_index=rank)]
        assert ids(build(rank=rank, balance=False)) == [dealt[k : k + 4] for k in range(0, 40, 4)]


def test_ranks_with_shards_of_their_own() -> None:
    shards = [stream_of(2).shard(num_shards=2, index=rank) for rank in range(2)]
    own = [[row["id"] for row in shard] for shard in shards]
    expected = [sorted(own[0][k : k + 8] + own[1][k : k + 8]) for k in range(0, 40, 8)]
    assert steps(shards) == expected
    assert ids(build(shards, 1, balance=False)) == [own[1][k : k + 4] for k in range(0, 40, 4)]


def test_padded_balancing_takes_less_time_than_the_stock_grouping() -> None:
    stream = build(padded=True)
    list(stream)
    plans = [stream.plan_of(0, step) for step in range(5)]
    assert all(plan is not None and plan.assignment.predicted_s <= plan.assignment.baseline_s for plan in plans)
    assert any(plan is not None and plan.assignment.speedup > 1.05 for plan in plans)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_the_number_of_loader_workers_changes_nothing(num_workers: int) -> None:
    stream = build(stream_of(4, shuffled=True), 1)
    loader: Any = DataLoader(
        stream, batch_size=None, collate_fn=list, num_workers=num_workers, timeout=60 if num_workers else 0,
        persistent_workers=num_workers > 1,
    )  # fmt: skip
    for epoch in (0, 2):
        stream.set_epoch(epoch)
        direct = build(stream_of(4, shuffled=True), 1)
        direct.set_epoch(epoch)
        assert ids(loader) == ids(direct), epoch


def test_reading_leaves_the_epoch_that_loader_workers_share_alone() -> None:
    """`datasets` adds the difference to it: two workers that set it at once would get another epoch."""
    source = stream_of(4, shuffled=True)
    reader = RowReader(source)
    read = [row["id"] for row in reader.rows(2)]
    assert source.epoch == 0
    source.set_epoch(2)
    assert read == [row["id"] for row in source]


def test_an_epoch_reshuffles_as_its_source_does() -> None:
    stream = build(stream_of(4, shuffled=True))
    first = ids(stream)
    assert ids(stream) == first
    stream.set_epoch(1)
    assert ids(stream) != first
    source = stream_of(4, shuffled=True)
    source.set_epoch(1)
    order = [row["id"] for row in source]
    other = build(stream_of(4, shuffled=True), 1)
    other.set_epoch(1)
    assert sorted(i for group in [*ids(stream), *ids(other)] for i in group) == sorted(order[:80])


@pytest.mark.parametrize("window_steps", [1, 2])
def test_resuming_at_every_microbatch(window_steps: int) -> None:
    whole = ids(build(stream_of(shuffled=True), window_steps=window_steps))
    for done in range(len(whole) + 1):
        running = build(stream_of(shuffled=True), window_steps=window_steps)
        iterator = iter(running)
        for _ in range(done):
            next(iterator)
        state = json.loads(json.dumps(running.state_dict()))
        assert (state["step"], state["slot"]) == divmod(done, 2)
        resumed = build(stream_of(shuffled=True), window_steps=window_steps)
        resumed.load_state_dict(state)
        assert ids(resumed) == whole[done:], done
    loader: Any = DataLoader(resumed, batch_size=None, collate_fn=list, num_workers=2, timeout=60)
    resumed.load_state_dict({**state, "step": 2, "slot": 1})
    assert ids(loader) == whole[5:]


@pytest.mark.parametrize(("num_ranks", "num_slots"), [(1, 4), (4, 1), (1, 1), (8, 2)])
def test_resuming_on_another_number_of_ranks(num_ranks: int, num_slots: int) -> None:
    whole = steps()
    size = 16 // (num_ranks * num_slots)
    state = build().state_dict(num_microbatches=6)
    rest = []
    for rank in range(num_ranks):
        resumed = build(rank=rank, num_ranks=num_ranks, num_slots=num_slots, batch_size=size)
        resumed.load_state_dict(state)
        rest.append(ids(resumed))
    found = [
        sorted(i for own in rest for group in own[k : k + num_slots] for i in group)
        for k in range(0, len(rest[0]), num_slots)
    ]
    assert found == whole[3:]


def test_states_that_cannot_be_resumed() -> None:
    state = build().state_dict()
    with pytest.raises(BalanceError, match=r"16 samples a step.* has 8 here"):
        build(batch_size=2).load_state_dict(state)
    with pytest.raises(BalanceError, match=r"between\s+steps"):
        build(num_slots=1, batch_size=8).load_state_dict({**state, "slot": 1})


def test_only_kept_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dflop import profile_dataset
    from tests.unit.rows import tiny as processors

    annotated, _ = profile_dataset(conversations(24).to_iterable_dataset(num_shards=2), processors.llava())
    decoded: list[Any] = []
    stock = RowReader.decoded
    monkeypatch.setattr(RowReader, "decoded", lambda self, row: decoded.append(row) or stock(self, row))
    stream = build(annotated, num_slots=1)
    stream.load_state_dict({**stream.state_dict(), "step": 1})
    kept = list(stream)
    assert len(kept) == 2
    assert len(decoded) == sum(map(len, kept)) < 16
    plain = list(annotated)
    for row in kept[0] + kept[1]:
        assert row in plain  # pictures compare by their pixels


def test_a_stream_that_is_no_dataset() -> None:
    class Rows(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(ROWS)

    assert ids(build(Rows())) == ids(build())


def test_caps_and_giants() -> None:
    capped = build(caps=Caps(max_tokens=110), oversize="alone", num_slots=4, batch_size=2)
    for rows in capped:
        tokens = [row["dflop_image_tokens"] + row["dflop_text_tokens"] for row in rows]
        assert sum(tokens) <= 110 or len(tokens) == 1
    with pytest.raises(BalanceError, match=r"epoch 0, step \d.*oversize"):
        list(build(caps=Caps(max_tokens=20)))
    # A cap that is not given: no microbatch above `batch_size` times the largest sample of its step.
    for start in range(0, 80, 16):
        largest = max(len(ROWS[i]["input_ids"]) for i in range(start, start + 16))
        for rank in (0, 1):
            for rows in ids(build(rank=rank, padded=True))[start // 8 : start // 8 + 2]:
                assert len(rows) * max(len(ROWS[i]["input_ids"]) for i in rows) <= 4 * largest


def test_images_are_spread_or_the_step_is_refused() -> None:
    filled = build(spread_images=True, fill_images=True)
    assert len(list(filled)) == 10
    with_images = np.array([bool(row["images"]) for row in ROWS])
    enough = with_images[:80].reshape(5, 16).sum(axis=1) >= 4
    assert enough.all()
    assert all(any(row["images"] for row in rows) for rank in (0, 1) for rows in build(rank=rank, spread_images=True))
    bare = Dataset.from_list([row for row in ROWS if not row["images"]][:16]).to_iterable_dataset()
    with pytest.raises(BalanceError, match=r"step 0 has 0 samples with an image for 4 microbatches.*dummy_image"):
        list(build(bare, spread_images=True))


def test_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="2 streams for 3 ranks"):
        build([stream_of(), stream_of()], num_ranks=3)
    with pytest.raises(ValueError, match="rank=2, num_ranks=2"):
        build(rank=2)
    with pytest.raises(DatasetError, match="no shape column 'dflop_num_images'"):
        list(build(ROWS.select_columns(["id"]).to_iterable_dataset()))
