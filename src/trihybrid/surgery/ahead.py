"""Building slots in a thread while tensors are copied, as many ahead of their turn as memory is set aside for."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trihybrid.surgery.slots import BuiltSlot

AHEAD_BYTES = 1 << 30
"""What slots may take that were built before their turn."""


class Ahead:
    """Slots, and other work, done by one thread. A context; its end waits for what the thread is at and drops the rest.

    Args:
        slots: the iterator that builds them.
        count: how many it gives.
        length: bytes of all of them in the file.
    """

    def __init__(self, slots: Iterator[BuiltSlot], count: int, length: int) -> None:
        self._slots, self._count = slots, count
        self._thread = ThreadPoolExecutor(1)
        # While it waits, a slot is in float32, twice the bytes that it has in most files.
        ahead = max(1, min(count, AHEAD_BYTES * count // max(2 * length, 1)))
        self._pending = deque(self._thread.submit(next, slots) for _ in range(min(ahead, count)))
        self._others: list[Future[Any]] = []

    def also(self, work: Callable[[], object]) -> None:
        """Let the thread do something else when it has built what it may."""
        self._others.append(self._thread.submit(work))

    def check(self) -> None:
        """Raise what the thread has raised so far, so that nobody copies for nothing."""
        for future in (*self._pending, *self._others):
            if future.done():
                future.result()

    def finish(self) -> None:
        """Wait for the other work."""
        for future in self._others:
            future.result()

    def __iter__(self) -> Iterator[BuiltSlot]:
        for left in range(self._count, 0, -1):
            built = self._pending.popleft().result()
            if left - 1 > len(self._pending):
                self._pending.append(self._thread.submit(next, self._slots))
            yield built

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
