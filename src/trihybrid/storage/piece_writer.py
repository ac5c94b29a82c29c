"""A file that is written front to back in pieces of 16 MiB, each hashed and written by threads while others are filled.

Whole pieces go past the page cache where the file system lets them (O_DIRECT): at these sizes that takes a fifteenth of
the processor's time and leaves the cache to others.
"""

import errno
import logging
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trihybrid.storage.digest import PIECE, THREADS, entry, piece_digest

BUFFERS = 8
WRITERS = 3
SECTOR = 4096
"""Length and places of direct writes are multiples of it."""
DIRECT = getattr(os, "O_DIRECT", 0)

_logger = logging.getLogger(__name__)


class PieceWriter:
    """The bytes of one new file. `close` or `abandon` ends it.

    Args:
        path: a file that does not exist yet.

    Raises:
        OSError: the disk is full, or refuses in another way; from any of its methods.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = _open_direct(path)
        self._pool = ThreadPoolExecutor(WRITERS + THREADS)
        # Mapped memory begins at a page, as direct writes want it.
        self._buffers = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(BUFFERS)]
        self._writes: list[Future[None]] = []
        self._digests: list[Future[bytes]] = []
        self._filled = 0

    def space(self) -> memoryview:
        """What is free of the current piece; never empty."""
        return self._current()[self._filled :]

    def advance(self, count: int) -> None:
        """`count` bytes of `space` were filled."""
        self._filled += count
        if self._filled == PIECE:
            self._send()

    def close(self) -> dict[str, Any]:
        """Put all of it on the disk; returns the manifest's entry of the file."""
        try:
            if self._filled or not self._writes:
                self._send()
            for write in self._writes[-BUFFERS:]:
                write.result()
            os.fsync(self._handle)
            size = os.fstat(self._handle).st_size
            return entry(size, [digest.result() for digest in self._digests])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of file and threads."""
        self._pool.shutdown(cancel_futures=True)
        os.close(self._handle)
        if self._direct is not None:
            os.close(self._direct)

    def _current(self) -> memoryview:
        return self._buffers[len(self._writes) % BUFFERS]

    def _send(self) -> None:
        piece, offset = self._current()[: self._filled], len(self._writes) * PIECE
        self._writes.append(self._pool.submit(self._write, piece, offset))
        self._digests.append(self._pool.submit(piece_digest, piece))
        self._filled = 0
        # The buffer that comes next is free when its piece, BUFFERS before, is written and hashed.
        before = len(self._writes) - BUFFERS
        if before >= 0:
            self._writes[before].result()
            self._digests[before].result()

    def _write(self, piece: memoryview, offset: int) -> None:
        done = 0
        while done < len(piece):
            rest, place = piece[done:], offset + done
            aligned = not (len(rest) % SECTOR or place % SECTOR or done % SECTOR)
            direct = self._direct if aligned else None
            count = os.pwrite(self._handle if direct is None else direct, rest, place)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            done += count


def _open_direct(path: Path) -> int | None:
    """A handle whose writes go past the page cache; None where there is no such thing."""
    try:
        if DIRECT:
            return os.open(path, os.O_WRONLY | DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    _logger.info("%s: written through the page cache; its file system takes no direct writes", path)
    return None
