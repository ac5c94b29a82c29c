"""Windows of packed documents as batches, with an exact cursor.

The stream of shards is cut into windows of T + 1 tokens at stride T: neighbours share one token, which is the
last target of one and the first input of the next. Positions restart at every BOS and at the window's head;
they alone tell a model where documents end. Training order is a pure function of (seed, step), so that a run
resumes by asking for the next step.

Shape letters: B rows of a batch, T tokens of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shards import TokenShards

NAMED = 64  # windows that a message lists
IGNORED = -100  # the target that torch's cross entropy leaves out


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents.

    tokens_BT: int64 [B, T + 1], ids.
    positions_BT: int64 [B, T + 1], place of each token in its document, 0 at each BOS and at the window's
        head.
    """

    tokens_BT: Tensor
    positions_BT: Tensor

    @property
    def inputs(self) -> Tensor:
        """int64 [B, T]: what the model reads."""
        return self.tokens_BT[:, :-1]

    @property
    def targets(self) -> Tensor:
        """int64 [B, T]: the next token of each input, -100 where that is a BOS (the border of a document)."""
        return self.tokens_BT[:, 1:].masked_fill(self.positions_BT[:, 1:] == 0, IGNORED)

    @property
    def next_tokens(self) -> Tensor:
        """int64 [B, T]: the next token of each input, the BOS of the following document included."""
        return self.tokens_BT[:, 1:]

    @property
    def positions(self) -> Tensor:
        """int64 [B, T]: restarting positions of the inputs."""
        return self.positions_BT[:, :-1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device; `non_blocking` as for torch's `to`."""
        return Batch(
            self.tokens_BT.to(device, non_blocking=non_blocking),
            self.positions_BT.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies on its own; needs CUDA."""
        return Batch(self.tokens_BT.contiguous().pin_memory(), self.positions_BT.contiguous().pin_memory())

    def split(self, parts: int) -> list["Batch"]:
        """The rows in `parts` equal parts, in their order; the parts are views.

        Raises:
            ValueError: for fewer than one part, or rows that `parts` does not divide.
        """
        rows = self.tokens_BT.shape[0]
        if parts < 1 or rows % parts:
            raise ValueError(f"parts is {parts}, must be at least 1 and divide the batch of {rows} rows")
        size = rows // parts
        return [
            Batch(tokens_BT, positions_BT)
            for tokens_BT, positions_BT in zip(
                self.tokens_BT.split(size), self.positions_BT.split(size), strict=True
            )
        ]

    def part(self, index: int, count: int) -> "Batch":
        """Part `index` of the `count` equal ones, one after the other, that the inputs of every row are cut into, with
        their targets; a view.

        Raises:
            ValueError: for an index outside 0..count - 1, or rows of a length that `count` does not divide.
        """
        length = self.tokens_BT.shape[1] - 1
        if not 0 <= index < count or length % count:
            raise ValueError(
                f"index is {index} of count {count}, in rows of {length} tokens: needs 0 <= index < count, and a count "
                "that divides the tokens of a row"
            )
        size = length // count
        own = slice(index * size, (index + 1) * size + 1)
        return Batch(self.tokens_BT[:, own], self.positions_BT[:, own])


class PackedBatches:
    """Training batches, shuffled or not; `batch(step)` depends on nothing but the arguments.

    Rows are numbered through the whole training: row r of the run is window `r mod windows` of the
    permutation of epoch `r // windows`, and step s takes rows s * batch_size onwards. So every epoch shows
    every window exactly once, also where an epoch ends inside a batch. The last (len(shards) - 1) mod T
    targets are never shown.

    Args:
        shards: the stream.
        sequence_length: T, inputs of a row, >= 1.
        batch_size: B, rows of the global batch, >= 1.
        seed: chooses the permutations, in 0..2**64 - 1; None leaves the windows in the order of the stream.

    Raises:
        ValueError: for sizes out of range, or a stream of fewer windows than one batch.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, batch_size: int, seed: int | None) -> None:
        _check_sizes(sequence_length, batch_size)
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, allowed 0 to 2**64 - 1")
        self._windows = (len(shards) - 1) // sequence_length
        if self._windows < batch_size:
            raise ValueError(
                f"{len(shards)} tokens give {self._windows} windows of sequence_length {sequence_length}, "
                f"fewer than batch_size {batch_size}: lower one of the two or give more text"
            )
        self._shards = shards
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    @property
    def windows(self) -> int:
        """Windows in the stream: rows of one epoch."""
        return self._windows

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step, counted from 0: all of it, or its rows rank, rank + world, ...

        Raises:
            ValueError: for a negative step, a rank outside 0..world - 1, or a batch_size that `world` does
                not divide.
        """
        if world < 1 or not 0 <= rank < world or self._batch_size % world:
            raise ValueError(
                f"rank is {rank} of world {world}, batch_size {self._batch_size}: needs 0 <= rank < world, "
                "and a batch_size that world divides"
            )
        length = self._sequence_length
        windows = self.windows_of(step)[rank::world]
        return _as_batch(self._shards.rows(windows * length, length + 1), self._shards.bos_id)

    def windows_of(self, step: int) -> np.ndarray:
        """Numbers of the windows in the global batch of this step, in the order of its rows, int64 [batch_size].
        ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step is {step}, must be at least 0")
        row, end = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while row < end:
            epoch, place = divmod(row, self._windows)
            parts.append(self._permutation(epoch)[place : place + end - row])
            row += parts[-1].size
        return np.concatenate(parts)

    def name(self, step: int, rank: int = 0, world: int = 1) -> str:
        """What `batch` of the same arguments reads, for messages: the windows and their tokens of the stream."""
        length = self._sequence_length
        windows = self.windows_of(step)[rank::world].tolist()
        listed = ", ".join(f"{w} ({w * length}-{(w + 1) * length})" for w in windows[:NAMED])
        more = f" and {len(windows) - NAMED} more" if len(windows) > NAMED else ""
        return f"windows {listed}{more} of {self._shards.folder}"

    def _permutation(self, epoch: int) -> np.ndarray:
        """Order of the windows in one epoch, int64 [windows].

        Sorted raw bits of Philox: numpy promises the bits for ever, but not the result of its own
        permutation().
        """
        if self._seed is None:
            return np.arange(self._windows)
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a batch spans two epochs at most
                self._permutations.clear()
            bits = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw(
                self._windows
            )
            self._permutations[epoch] = np.argsort(bits, kind="stable")
        return self._permutations[epoch]


def sequential(
    shards: TokenShards, sequence_length: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Batches in the order of the stream, for evaluation: every target once, the last batch shorter.

    The last window is padded with BOS: each is a document of its own, so that its target is ignored.

    Args:
        shards: the stream.
        sequence_length: T, inputs of a row, >= 1.
        batch_size: B, rows of a batch, >= 1.
        limit: read the first `limit` tokens of the stream only, >= 2; None reads all.

    Raises:
        ValueError: for sizes out of range (when the first batch is asked for).
    """
    _check_sizes(sequence_length, batch_size)
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}, must be at least 2 tokens")
    total = len(shards) if limit is None else min(limit, len(shards))
    starts = range(0, total - 1, sequence_length)
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        rows_BT = np.full((len(chosen), sequence_length + 1), shards.bos_id, dtype=np.int64)
        for row_T, start in zip(rows_BT, chosen, strict=True):
            tokens = shards.tokens(start, min(start + sequence_length + 1, total))
            row_T[: tokens.size] = tokens
        yield _as_batch(rows_BT, shards.bos_id)


def _as_batch(tokens_BT: np.ndarray, bos_id: int) -> Batch:
    """Widen rows to int64 and add restarting positions."""
    rows, columns = tokens_BT.shape
    wide_BT, positions_BT = np.empty((2, rows, columns), dtype=np.int64)
    wide_BT[:] = tokens_BT
    positions_BT[:] = np.arange(columns)
    # Documents are long: to count again behind each BOS costs far less than a running maximum over the rows.
    flat_N = positions_BT.reshape(-1)
    border_N = np.flatnonzero(tokens_BT == bos_id)
    end_N = np.minimum(np.append(border_N[1:], flat_N.size), (border_N // columns + 1) * columns)
    for border, end in zip(border_N.tolist(), end_N.tolist(), strict=True):
        flat_N[border:end] -= flat_N[border]
    return Batch(torch.from_numpy(wide_BT), torch.from_numpy(positions_BT))


def _check_sizes(sequence_length: int, batch_size: int) -> None:
    if sequence_length < 1 or batch_size < 1:
        raise ValueError(
            f"sequence_length is {sequence_length} and batch_size {batch_size}: both must be at least 1"
        )
