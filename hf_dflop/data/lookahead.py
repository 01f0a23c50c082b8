"""The next results are computed while the caller does something else: one thread, a bounded look-ahead.

Inputs: items and a pure function. Output: the function of each item, in order. What comes out does not depend on
when the thread runs, only how long the caller waits does.

The thread starts with the first `next()`, so that loader workers forked before it inherit no thread; a process that
is forked later computes for itself. It ends when the items do, or when the iterator is closed or forgotten.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["look_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def look_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, depth: int
) -> Generator[tuple[Result, float], None, None]:
    """Yields (result, seconds that the caller waited for it), in the order of `items`.

    Args:
        function (`Callable`): pure; releases the GIL where it is long. What it raises is raised here, at its turn.
        items (`Iterable`): read by the caller's thread, at most `depth` ahead.
        depth (`int`): results computed ahead of the one that the caller holds; 0 computes in the caller's thread.

    Example:
        >>> [result for result, wait_s in look_ahead(abs, [-1, 2, -3], depth=2)]
        [1, 2, 3]
    """
    owner = os.getpid()
    items = iter(items)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_dflop-plan") if depth else None
    pending: deque[tuple[Item, Future[Result] | None]] = deque()
    try:
        while True:
            for item in itertools.islice(items, depth + 1 - len(pending)):
                # A forked process has the executor, but not its thread.
                is_own = executor is not None and os.getpid() == owner
                pending.append((item, executor.submit(function, item) if executor is not None and is_own else None))
            if not pending:
                return
            item, future = pending.popleft()
            begin = time.perf_counter()
            result = future.result() if future is not None and os.getpid() == owner else function(item)
            yield result, time.perf_counter() - begin
    finally:
        # No waiting: the garbage collector may run this in the thread itself.
        if executor is not None and os.getpid() == owner:
            executor.shutdown(wait=False, cancel_futures=True)
