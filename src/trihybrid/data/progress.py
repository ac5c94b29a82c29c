"""How far the encoding has come: a line that moves on a terminal, a log line now and then elsewhere."""

import logging
import time
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)

DOCUMENTS_A_LINE = 10_000


class DocumentProgress:
    """Counts documents, bytes of text and tokens while they are made; a context manager.

    Args:
        name: what is being made.
        console: where to draw; None: standard error.
    """

    def __init__(self, name: str, console: Console | None = None) -> None:
        console = Console(stderr=True) if console is None else console
        self._name = name
        self._documents = self._text_bytes = self._tokens = 0
        self._start = time.perf_counter()
        self._bar = (
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )
        if self._bar is not None:
            self._task = self._bar.add_task(self._text())

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            logger.info("data: %s in %.1f s", self._text(), time.perf_counter() - self._start)

    def add(self, documents: int, text_bytes: int, tokens: int) -> None:
        """Count some more."""
        before = self._documents // DOCUMENTS_A_LINE
        self._documents += documents
        self._text_bytes += text_bytes
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, description=self._text())
        elif self._documents // DOCUMENTS_A_LINE > before:
            logger.info("data: %s so far", self._text())

    def _text(self) -> str:
        return (
            f"{self._name}: {self._documents:,} documents, {self._text_bytes / 1e6:.1f} MB of text, "
            f"{self._tokens / 1e6:.2f} M tokens"
        )
