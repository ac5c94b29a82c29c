"""Which code ran: one hash over the package's own sources.

A result and the code that is said to have made it belong together only where somebody can check it, so every run
writes this hash into its log.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from trihybrid.run.lineage import hash_json

CARRIED = "code_hash.txt"
"""File beside the package's `__init__.py` by which a bundle, whose sources are stripped, says of which sources it was
made. An installed package and a checkout have none."""


@cache
def code_hash() -> str:
    """sha256 (64 hexadecimal digits) of the sorted list of [relative path, sha256] of all `.py` files of the package;
    in a single-file bundle the hash that it carries.

    Raises:
        ValueError: the carried hash is not one.
    """
    root = files("trihybrid")
    carried = root / CARRIED
    if carried.is_file():
        text = carried.read_text(encoding="ascii").strip()
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise ValueError(f"{CARRIED}: {text[:80]!r} is no sha256; make the bundle again")
        return text
    return hash_json(
        [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(_sources(root))]
    )


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """(path with slashes, content) of the sources under a folder of the package."""
    for item in folder.iterdir():
        if item.is_dir():
            yield from _sources(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".py"):
            yield f"{prefix}{item.name}", item.read_bytes()
