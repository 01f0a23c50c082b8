"""Rows of a stream, in the order of the stock run, with their images undecoded until a rank keeps them.

Input: a `datasets.IterableDataset`, or any iterable of rows. Output: an iterator over all rows of an epoch, the same
in every process and in every loader worker, and a function that decodes the rows that are kept.

A `datasets.IterableDataset` gives each loader worker some of its shards when it is iterated there. Here every worker
must see all rows, so it is read through `.iter()`, which does not.

Assumptions: another kind of stream does not split itself over loader workers.
"""

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["RowReader"]

Row = dict[str, Any]


class RowReader:
    """Reads a stream from its beginning, once an epoch.

    Args:
        source (`datasets.IterableDataset` or an iterable of rows): read anew for every epoch.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self._decode: Callable[[Row], Row] | None = None
        features = getattr(source, "features", None)
        if features is not None and hasattr(source, "decode") and getattr(source, "_formatting", None) is None:
            self._decode = features.decode_example

    def set_epoch(self, epoch: int) -> None:
        """Tell the source which epoch comes; in the process that loader workers are forked from, before they read."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def rows(self, epoch: int) -> Iterator[Row]:
        """All rows of `epoch`, images undecoded where their columns are known."""
        # A stream of `datasets` shares its epoch with loader workers and sets it by adding the difference, which two
        # of them at once do twice. What is derived from it here has an epoch of its own.
        stream = self.source if self._decode is None else self.source.decode(False)
        if hasattr(stream, "set_epoch") and getattr(stream, "epoch", None) != epoch:
            stream.set_epoch(epoch)
        if hasattr(stream, "iter"):
            for batch in stream.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}
        else:
            yield from stream

    def decoded(self, row: Row) -> Row:
        """The row as iterating over the source gives it."""
        return row if self._decode is None else self._decode(row)
