"""The states that an engine owns: preallocated once, written in place.

    ring     a sliding window of W tokens: token t of row r lies at place t mod W of line r
    pages    attention over everything: token t of a sequence lies in its page t // L, at place t mod L; a page belongs
             to whoever the engine gave it to, and the same number names it in every layer
    matrix   a recurrence: one float32 matrix [K, V] a head and row

A row is one sequence. Everything starts as zeros and stays finite, since what is masked is still multiplied by zero.

Legend: R rows, W window, G key/value heads, N head width, P pages, L tokens of a page, H heads, K key width, V value
width.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trihybrid.infer.memory import free_bytes, gib

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateShape:
    """What one mixer of one layer stores.

    Attributes:
        layer: index of the layer.
        kind: `ring`, `pages` or `matrix`.
        heads: key/value heads of keys and values, heads of a matrix.
        width: of a head; a matrix has it twice.
        window: W of a ring.
    """

    layer: int
    kind: Literal["ring", "pages", "matrix"]
    heads: int
    width: int
    window: int = 0

    @property
    def name(self) -> str:
        """Its name in a session file."""
        return f"layers.{self.layer}.{self.kind}"


@dataclass
class Stored:
    """Keys and values of one layer: a ring [R, W, G, N] or pages [P, L, G, N]."""

    keys: Tensor
    values: Tensor


class States:
    """The states of `rows` sequences.

    Args:
        shapes: one for each mixer that stores something.
        rows: R.
        length: L.
        dtype: of keys and values; matrices are float32, or float64 where it is.
        device: of everything.
        tokens: how many the pages are going to hold, for the check alone; 0 where they grow as needed.

    Raises:
        ValueError: rows and tokens need more than the device has free; nothing was allocated.
    """

    def __init__(
        self,
        shapes: list[StateShape],
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        tokens: int = 0,
    ) -> None:
        self.shapes, self.rows, self.length = shapes, rows, length
        self._dtype, self._device = dtype, device
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        needed, free = rows * self.row_bytes + tokens * self.token_bytes, free_bytes(device)
        if free is not None and needed > free:
            raise ValueError(
                f"rows is {rows:,}, of {self.row_bytes:,} bytes each, and tokens is {tokens:,}, of "
                f"{self.token_bytes:,}: together {gib(needed)} of {device}, where {gib(free)} are free; "
                "take fewer rows or tokens"
            )
        logger.info(
            "states: %d rows of %s bytes and %s tokens of %s bytes, together %s",
            rows, f"{self.row_bytes:,}", f"{tokens:,}", f"{self.token_bytes:,}", gib(needed),
        )  # fmt: skip
        self.rings: dict[int, Stored] = {}
        self.pages: dict[int, Stored] = {}
        self.matrices: dict[int, Tensor] = {}
        self.capacity = 0
        for shape in shapes:
            if shape.kind == "matrix":
                sizes = (rows, shape.heads, shape.width, shape.width)
                self.matrices[shape.layer] = torch.zeros(sizes, dtype=self._wide, device=device)
            elif shape.kind == "ring":
                self.rings[shape.layer] = self._stored(rows, shape.window, shape)
            else:
                self.pages[shape.layer] = self._stored(0, length, shape)

    def _stored(self, lines: int, tokens: int, shape: StateShape) -> Stored:
        sizes = (lines, tokens, shape.heads, shape.width)
        return Stored(*(torch.zeros(sizes, dtype=self._dtype, device=self._device) for _ in range(2)))

    @property
    def row_bytes(self) -> int:
        """Bytes that a row holds at any length."""
        rings = sum(
            2 * shape.window * shape.heads * shape.width for shape in self.shapes if shape.kind == "ring"
        )
        matrices = sum(shape.heads * shape.width**2 for shape in self.shapes if shape.kind == "matrix")
        return rings * self._dtype.itemsize + matrices * self._wide.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token takes."""
        pages = [shape for shape in self.shapes if shape.kind == "pages"]
        return sum(2 * shape.heads * shape.width for shape in pages) * self._dtype.itemsize

    def shortage(self, capacity: int) -> str | None:
        """Why the store cannot have `capacity` pages in what is free now; None where it can, or where nobody knows."""
        more = (capacity - self.capacity) * self.length
        layers = sum(shape.kind == "pages" for shape in self.shapes)
        # While a layer grows its old store is still there.
        old = self.capacity * self.length * self.token_bytes // max(layers, 1)
        needed, free = more * self.token_bytes + old, free_bytes(self._device)
        if free is None or needed <= free:
            return None
        return (
            f"room for {more:,} more tokens of keys and values needs {gib(needed)} of {self._device}, where "
            f"{gib(free)} are free"
        )

    def grow(self, capacity: int) -> None:
        """Have `capacity` pages; the contents stay. The old and the new store exist together for a moment, a layer at a
        time."""
        for shape in self.shapes:
            if shape.kind == "pages":
                new, old = self._stored(capacity, self.length, shape), self.pages[shape.layer]
                new.keys[: self.capacity], new.values[: self.capacity] = old.keys, old.values
                old.keys, old.values = new.keys, new.values
        self.capacity = capacity

    def clear(self, row: int) -> None:
        """Bring a row to the state before the first token."""
        for ring in self.rings.values():
            ring.keys[row] = 0
            ring.values[row] = 0
        for matrix in self.matrices.values():
            matrix[row] = 0

    def copy(self, source: int, target: int) -> None:
        """Make row `target` what row `source` is."""
        for part in self._lines():
            part[target] = part[source]

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows."""
        for part in self._lines():
            part[[first, second]] = part[[second, first]]

    def clear_pages(self, pages: list[int]) -> None:
        """Zero pages that change hands, so that nothing of their last owner is left, not even what is not finite."""
        for stored in self.pages.values():
            stored.keys[pages] = 0
            stored.values[pages] = 0

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` what page `source` is, in every layer."""
        for stored in self.pages.values():
            stored.keys[target] = stored.keys[source]
            stored.values[target] = stored.values[source]

    def read_row(self, row: int) -> dict[str, Tensor]:
        """What a row holds beside pages, cloned: `<name>.keys` and `.values` of rings, `<name>` of matrices."""
        return {name: part[row].clone() for name, part in self._named_lines().items()}

    def write_row(self, row: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of `read_row`."""
        for name, part in self._named_lines().items():
            part[row] = tensors[name]

    def read_pages(self, pages: list[int], tokens: int) -> dict[str, Tensor]:
        """The first `tokens` tokens of these pages, [tokens, G, N]: `<name>.keys` and `.values`."""
        return {
            name: part[pages].flatten(0, 1)[:tokens].clone() for name, part in self._named_pages().items()
        }

    def write_pages(self, pages: list[int], tensors: dict[str, Tensor]) -> None:
        """The inverse of `read_pages`, into pages that were cleared."""
        for name, part in self._named_pages().items():
            for place, page in enumerate(pages):
                piece = tensors[name][place * self.length : (place + 1) * self.length]
                part[page, : len(piece)] = piece

    def shapes_of_row(self, tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and dtype of all that `read_row` and `read_pages` give for a sequence of `tokens` tokens."""
        lines = {name: (tuple(part.shape[1:]), part.dtype) for name, part in self._named_lines().items()}
        pages = {name: ((tokens, *part.shape[2:]), part.dtype) for name, part in self._named_pages().items()}
        return lines | pages

    def line_names(self) -> list[str]:
        """Names of what a row holds beside pages."""
        return list(self._named_lines())

    def _named_lines(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for shape in self.shapes:
            if shape.kind == "ring":
                ring = self.rings[shape.layer]
                named |= {f"{shape.name}.keys": ring.keys, f"{shape.name}.values": ring.values}
            elif shape.kind == "matrix":
                named[shape.name] = self.matrices[shape.layer]
        return named

    def _named_pages(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for shape in self.shapes:
            if shape.kind == "pages":
                stored = self.pages[shape.layer]
                named |= {f"{shape.name}.keys": stored.keys, f"{shape.name}.values": stored.values}
        return named

    def _lines(self) -> list[Tensor]:
        return list(self._named_lines().values())
