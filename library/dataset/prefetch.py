"""Making things ahead of time in threads, and handing them out in order.

Threads, not processes: image decoders, numpy and file reads let go of Python's lock, threads start at once, share the order
and the caches, and need no pickling on Windows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")


@contextmanager
def thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of at least one thread, which drops what still waits when an error or Ctrl-C ends the block."""
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(make: Callable[[Key], Result], keys: Iterable[Key], *, workers: int, depth: int) -> Prefetch[Key, Result]:
    """Iterates over ``make(key)`` in the order of ``keys``, with up to ``depth`` results in the making or waiting.

    ``workers=0`` makes each when it is asked for. ``keys`` may be endless; it is read in the consumer's thread. An exception
    of ``make`` or ``keys`` comes out at its place in the order and ends the iteration. Close it (or use ``with``) when
    stopping early.
    """
    return Prefetch(make, keys, workers=workers, depth=depth)


class Prefetch(Generic[Key, Result], Iterator[Result]):
    """See :func:`prefetch`. ``waited_s`` is the time the consumer has spent waiting for results so far, in seconds."""

    def __init__(self, make: Callable[[Key], Result], keys: Iterable[Key], *, workers: int, depth: int):
        self.waited_s = 0.0
        self._make = make
        self._keys = iter(keys)
        self._depth = max(depth, 1)
        self._pending: deque[Future[Result]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if workers > 0 else None
        self._open = True

    def __iter__(self) -> Prefetch[Key, Result]:
        return self

    def __next__(self) -> Result:
        if not self._open:
            raise StopIteration
        started = time.perf_counter()
        try:
            result = self._next()
        except BaseException:
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - started
        return result

    def _next(self) -> Result:
        if self._pool is None:
            return self._make(next(self._keys))
        self._fill(self._pool)
        if not self._pending:
            raise StopIteration
        result = self._pending.popleft().result()
        self._fill(self._pool)  # the threads go on while the consumer works on this result
        return result

    def _fill(self, pool: ThreadPoolExecutor) -> None:
        while len(self._pending) < self._depth:
            try:
                key = next(self._keys)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001  # raised when its turn comes
                failed: Future[Result] = Future()
                failed.set_exception(error)
                self._pending.append(failed)
                self._keys = iter(())
                return
            self._pending.append(pool.submit(self._make, key))

    def close(self) -> None:
        """Stops the threads: what has not begun is dropped, what has begun is waited for."""
        self._open = False
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch[Key, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
