"""Batches made ahead of time by one background thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from .packing import Batch


class Prefetch:
    """A function of the step that already has the next batches at hand.

    It returns what `batch` returns, whatever the order in which steps are asked for; steps that follow each other
    are made while the caller computes. `batch` is called by one thread only, so it need not be safe for
    several. On a GPU the thread puts the batch into page-locked memory, and the copy is queued on the stream of
    whoever asks for the step.

    Args:
        batch: makes the batch of a step.
        ahead: batches to make beyond the last one that was asked for, >= 1.
        device: where the batch is handed out; None leaves it where it was made.

    Raises:
        ValueError: if `ahead` is out of range.
    """

    def __init__(
        self, batch: Callable[[int], Batch], ahead: int = 2, device: torch.device | str | None = None
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}, must be at least 1")
        self._batch = batch
        self._ahead = ahead
        self._device = None if device is None else torch.device(device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            Whatever `batch` raised for this step; RuntimeError after `close`.
        """
        wanted = range(step, step + self._ahead + 1)
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for other in wanted:
            if other not in self._pending:
                self._pending[other] = self._thread.submit(self._make, other)
        made = self._pending.pop(step).result()
        return made if self._device is None else made.to(self._device, non_blocking=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was made ahead and end the thread; waits for the batch that is being made."""
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> Batch:
        made = self._batch(step)
        return made.pin_memory() if self._device is not None and self._device.type == "cuda" else made
