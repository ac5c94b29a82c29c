"""What a manifest says of one file: its size, and a sha256 that several threads can compute.

A file of at most one piece (16 MiB) has the sha256 of its bytes. A longer one has the sha256 of the sha256s of its
pieces, one after the other: as hard to forge, and the pieces are independent, so that a file of 10 GB is hashed while
it is written and checked by all cores. (One core without SHA instructions does 0.4 GB/s.)
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 1 << 24
"""Bytes of a piece; the last one of a file is what is left."""
THREADS = min(4, os.cpu_count() or 1)
WHOLE, PIECES = "sha256", "sha256_of_pieces"


def piece_digest(piece: bytes | bytearray | memoryview) -> bytes:
    """sha256 of one piece, 32 bytes. Other threads run meanwhile."""
    return hashlib.sha256(piece).digest()


def entry(size: int, digests: list[bytes]) -> dict[str, Any]:
    """{"bytes", "sha256" or "sha256_of_pieces"} of a file of `size` bytes from the digests of its pieces, in order."""
    if len(digests) == 1:
        return {"bytes": size, WHOLE: digests[0].hex()}
    return {"bytes": size, PIECES: hashlib.sha256(b"".join(digests)).hexdigest()}


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file that is on disk."""
    with path.open("rb") as file, ThreadPoolExecutor(THREADS) as pool:
        size = os.fstat(file.fileno()).st_size

        def digest(start: int) -> bytes:
            return piece_digest(os.pread(file.fileno(), PIECE, start))

        return entry(size, list(pool.map(digest, range(0, max(size, 1), PIECE))))


def check_entry(found: dict[str, Any]) -> dict[str, Any]:
    """An entry as it was read from a manifest.

    Raises:
        LookupError, TypeError, ValueError: not an entry.
    """
    name = WHOLE if WHOLE in found else PIECES
    return {"bytes": int(found["bytes"]), name: str(found[name])}


def matches(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a file has the bytes that an entry says; a sha256 of the whole of a long file (format 1) is read too."""
    if WHOLE not in wanted or wanted["bytes"] <= PIECE:
        return file_entry(path) == wanted
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted[WHOLE]
