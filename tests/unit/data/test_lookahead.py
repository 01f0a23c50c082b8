"""Results computed ahead: in order, the same whatever the timing, and no thread is left behind."""

import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest

from hf_dflop.data.lookahead import look_ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_dflop-plan")]


def assert_that_threads_end() -> None:
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not threads()


@pytest.mark.parametrize("depth", [0, 1, 4, 50])
def test_results_come_in_order(depth: int) -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert [r for r, _ in look_ahead(slow_at_first, range(20), depth=depth)] == [i * i for i in range(20)]
    assert_that_threads_end()


def test_no_more_than_the_depth_is_computed_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = look_ahead(lambda item: item, items(), depth=3)
    assert not threads(), "a thread before the first next() would be forked into loader workers"
    next(results)
    assert read == [0, 1, 2, 3]
    next(results)
    assert len(read) == 5
    results.close()
    assert_that_threads_end()


def test_waiting_is_measured_and_hidden_when_there_is_time() -> None:
    waits = []
    for _, wait_s in look_ahead(lambda _: time.sleep(0.02), range(6), depth=2):
        waits.append(wait_s)
        time.sleep(0.05)
    assert waits[0] >= 0.015
    assert max(waits[1:]) < 0.015


def test_an_error_comes_at_its_turn_and_ends_the_thread() -> None:
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("sample 3")
        return item

    found = []
    with pytest.raises(ValueError, match="sample 3"):
        found.extend(result for result, _ in look_ahead(fail_at_three, range(9), depth=4))
    assert_that_threads_end()
    results = look_ahead(fail_at_three, range(9), depth=4)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2], "what comes before the error is not lost"


def test_a_forgotten_iterator_ends_the_thread() -> None:
    results = look_ahead(lambda item: item, range(1000), depth=4)
    next(results)
    assert threads()
    del results
    gc.collect()
    assert_that_threads_end()


def test_a_forked_process_computes_for_itself() -> None:
    results = look_ahead(lambda item: item, range(9), depth=2)
    assert next(results)[0] == 0
    if (child := os.fork()) == 0:
        os._exit(0 if [result for result, _ in results] == list(range(1, 9)) else 1)
    deadline = time.monotonic() + 20
    while (state := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if state[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked process hangs")
    assert state[1] == 0
    assert [result for result, _ in results] == list(range(1, 9))
    assert_that_threads_end()
