"""What every rank would load without hf_dflop: accelerate's sharding of the stock batch sampler, replayed.

Inputs: the batch sampler of the prepared dataloader. Output: for every rank, the index lists of one epoch.
The tail of an epoch (wrap-around, `drop_last`, `even_batches`, `split_batches`) is computed by accelerate's own
`BatchSamplerShard`, so that it is right by construction; only the complete rounds before it are indexed directly.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard

__all__ = ["StockSharding"]


class _Batches:
    """A list of index lists that looks like a torch `BatchSampler`."""

    def __init__(self, batches: list[list[int]], batch_size: int | None, drop_last: bool) -> None:
        self.batches = batches
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[int]]:
        # BatchSamplerShard extends the first list that it is given when it wraps around.
        return (list(batch) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class StockSharding:
    """The stock batch sampler and how accelerate deals its batches to the ranks.

    Args:
        batch_sampler (`BatchSampler` or `BatchSamplerShard`):
            As found in the dataloader that `Accelerator.prepare` returned.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self._is_sharded = isinstance(batch_sampler, BatchSamplerShard)
        if self._is_sharded:
            self.base = batch_sampler.batch_sampler
            self.num_ranks = batch_sampler.num_processes
            self.rank = batch_sampler.process_index
            self.split_batches = batch_sampler.split_batches
            self.even_batches = batch_sampler.even_batches
        else:
            self.base = batch_sampler
            self.num_ranks, self.rank, self.split_batches, self.even_batches = 1, 0, False, True
        self.length = len(batch_sampler)

    @property
    def microbatch_size(self) -> int:
        """Samples of a full stock microbatch of one rank."""
        size = int(self.base.batch_size)
        return size // self.num_ranks if self.split_batches else size

    def set_epoch(self, epoch: int) -> None:
        """Seed the stock sampler as accelerate and Trainer do at the start of `epoch`."""
        for target in (self.base, getattr(self.base, "sampler", None)):
            if target is not None and hasattr(target, "set_epoch"):
                target.set_epoch(epoch)

    def epoch_groups(self) -> list[list[list[int]]]:
        """For every rank, its stock index lists of one epoch. Iterates the stock sampler once, as accelerate does."""
        batches = [list(batch) for batch in self.base]
        if not self._is_sharded:
            return [batches]
        stride = 1 if self.split_batches else self.num_ranks
        full = self.base.batch_size
        complete = len(batches) // stride
        while complete and any(len(batch) != full for batch in batches[(complete - 1) * stride : complete * stride]):
            complete -= 1
        # accelerate wraps around to the first `stride` batches: they lead, and what they yield is dropped again.
        lead = min(complete, 1)
        rest = batches[: lead * stride] + batches[complete * stride :]
        groups = []
        for rank in range(self.num_ranks):
            if self.split_batches:
                share = full // self.num_ranks
                own = [batch[share * rank : share * (rank + 1)] for batch in batches[:complete]]
            else:
                own = batches[rank : complete * stride : stride]
            shard = BatchSamplerShard(
                _Batches(rest, full, self.base.drop_last),
                num_processes=self.num_ranks,
                process_index=rank,
                split_batches=self.split_batches,
                even_batches=self.even_batches,
            )
            groups.append(own + [list(batch) for batch in shard][lead:])
        return groups
