from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from library.dataset.prefetch import prefetch, thread_pool


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_the_order_of_the_keys(workers: int) -> None:
    def slow_when_early(key: int) -> int:
        time.sleep(0.002 * (5 - key % 5))
        return key * key

    with prefetch(slow_when_early, range(20), workers=workers, depth=6) as results:
        assert list(results) == [key * key for key in range(20)]


@pytest.mark.parametrize("workers", [0, 3])
def test_endless_keys_are_read_no_further_than_the_depth(workers: int) -> None:
    read: list[int] = []

    def keys() -> Iterator[int]:
        for key in itertools.count():
            read.append(key)
            yield key

    with prefetch(str, keys(), workers=workers, depth=4) as results:
        assert [next(results) for _ in range(3)] == ["0", "1", "2"]
        assert len(read) <= 3 + 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_comes_at_its_place_and_ends_the_iteration(workers: int) -> None:
    results = prefetch(lambda key: 1 // (3 - key), range(6), workers=workers, depth=6)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_of_the_keys_comes_after_the_results_before_it(workers: int) -> None:
    def keys() -> Iterator[int]:
        yield from (1, 2)
        raise ValueError("no more keys")

    results = prefetch(str, keys(), workers=workers, depth=5)
    assert [next(results), next(results)] == ["1", "2"]
    with pytest.raises(ValueError, match="no more keys"):
        next(results)


def test_closing_early_stops_the_threads_and_drops_what_has_not_begun() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        time.sleep(0.01)
        made.append(key)
        return key

    results = prefetch(make, itertools.count(), workers=2, depth=50)
    assert next(results) == 0
    results.close()
    count = len(made)
    assert count < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    time.sleep(0.03)
    assert len(made) == count
    with pytest.raises(StopIteration):
        next(results)


def test_waiting_is_measured_and_working_ahead_saves_it() -> None:
    def make(key: int) -> int:
        time.sleep(0.02)
        return key

    with prefetch(make, range(3), workers=0, depth=1) as results:
        list(results)
        assert results.waited_s >= 0.06
    with prefetch(make, range(3), workers=1, depth=3) as ahead:
        next(ahead)
        before = ahead.waited_s
        time.sleep(0.1)  # the consumer works; the rest gets ready meanwhile
        list(ahead)
        assert ahead.waited_s - before < 0.02


def test_a_pool_drops_what_waits_when_its_block_fails() -> None:
    begun, done = threading.Event(), []

    def work(number: int) -> None:
        begun.set()
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(RuntimeError), thread_pool(0) as pool:  # a single thread
        pool.map(work, range(50))
        begun.wait()
        raise RuntimeError
    assert len(done) <= 2


@pytest.mark.skipif(os.name == "nt", reason="signals cannot be sent to a thread on Windows")
def test_ctrl_c_while_waiting_stops_the_threads() -> None:
    def make(key: int) -> int:
        if key == 8:  # by then all threads have started
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.05)
        return key

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), prefetch(make, itertools.count(), workers=2, depth=4) as results:
            list(results)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    with pytest.raises(StopIteration):
        next(results)
