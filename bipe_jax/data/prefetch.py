"""Work that threads do before its result is needed."""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any


class Prefetcher:
    """An iterator of the results of `make`, which a thread calls again and again.

    Args:
      make: called by that thread alone. An exception is raised by `next`, after the results before
        it, and by every later `next`.
      count: results that are buffered.
    """

    def __init__(self, make: Callable[[], Any], count: int):
        self._make, self._ready = make, queue.Queue(count)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self):
        while not self._stop.is_set():
            try:
                result = (self._make(), None)
            except BaseException as error:
                result = (None, error)
            self._ready.put(result)
            if result[1]:
                return

    def __next__(self):
        value, error = self._ready.get()
        if error:
            self._ready.put((value, error))
            raise error
        return value

    def close(self) -> None:
        """Ends the thread, after the call in progress."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)


def ordered_map(
    pool: Executor | None, function: Callable, items: Iterable, ahead: int = 0
) -> Iterator:
    """The built-in `map`, computed by a pool for up to `ahead` more items than were asked for.

    An exception of `items` is raised after the results of the items before it. Without a pool it is
    `map` itself.
    """
    if pool is None:
        yield from map(function, items)
        return
    pending, failure, iterator = collections.deque(), None, iter(items)
    while failure is None:
        try:
            pending.append(pool.submit(function, next(iterator)))
        except Exception as error:  # StopIteration is one
            failure = error
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
    if not isinstance(failure, StopIteration):
        raise failure
