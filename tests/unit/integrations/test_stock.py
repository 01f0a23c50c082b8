"""The replayed sharding equals accelerate's own, for every way to cut an epoch."""

import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from hf_dflop.integrations.stock import StockSharding

GRID = [
    case
    for case in itertools.product(
        (1, 5, 7, 16, 23, 24), (1, 2, 4), (1, 2, 3), (False, True), (False, True), (False, True)
    )
    if not case[4] or case[1] % case[2] == 0  # accelerate splits only batches that divide
]


@pytest.mark.parametrize(("count", "size", "ranks", "drop_last", "split", "even"), GRID)
def test_every_rank_gets_what_accelerate_gives_it(
    count: int, size: int, ranks: int, drop_last: bool, split: bool, even: bool
) -> None:
    base = BatchSampler(SequentialSampler(range(count)), size, drop_last)
    shards = [
        BatchSamplerShard(base, num_processes=ranks, process_index=r, split_batches=split, even_batches=even)
        for r in range(ranks)
    ]
    sharding = StockSharding(shards[-1])
    assert sharding.epoch_groups() == [list(shard) for shard in shards]
    assert sharding.length == len(shards[-1])
    assert sharding.microbatch_size == (size // ranks if split else size)


def test_a_plain_batch_sampler_is_one_rank() -> None:
    sharding = StockSharding(BatchSampler(SequentialSampler(range(5)), 2, False))
    assert sharding.epoch_groups() == [[[0, 1], [2, 3], [4]]]
    assert (sharding.rank, sharding.num_ranks) == (0, 1)
