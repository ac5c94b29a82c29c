"""Prefix reuse: states of earlier prompts and answers, from which a prompt that begins with the same tokens goes on.

A recurrence can be resumed where a snapshot of it was taken and nowhere else. Of each sequence they are taken

    behind the prompt but for its last token, which the step that chooses the first new one reads
    behind the answer but for its last token, which nothing has read
    at the borders of the first 1, 2, 4, 8, ... chunks of the prompt, so that of a beginning of n chunks that others
        share at least half is saved
    at the last border of a chunk up to which the prompt is the same as one that is kept, so that from the third on
        all whole chunks of a shared beginning are saved

The last is what arXiv 2411.19379 (Marconi) does for hybrid models: states where sequences part and where they end.
What was used longest ago leaves first.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

from trihybrid.infer.engine import PAGE, Engine, Snapshot

TOKEN_BYTES = 8
"""Of a token in the list of those that a state has seen."""
Key = tuple[int, int]
"""Number of tokens, and a hash of them."""


class Prefixes:
    """Snapshots of an engine within a bound of bytes.

    Args:
        engine: whose snapshots these are.
        most_bytes: of rows, of pages (each once, however many share it) and of the lists of tokens, at least 0. Where
            a state is larger than that, it is not kept.

    """

    def __init__(self, engine: Engine, most_bytes: int) -> None:
        self._engine, self._most = engine, most_bytes
        self._row = engine.bytes_of(0)
        self._page = PAGE * (engine.bytes_of(1) - self._row)
        self._kept: OrderedDict[Key, Snapshot] = OrderedDict()
        # How many snapshots have a length, hold a page, and begin with what is up to a border.
        self._lengths: Counter[int] = Counter()
        self._pages: Counter[int] = Counter()
        self._borders: Counter[Key] = Counter()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What the snapshots hold together."""
        return len(self._kept) * self._row + len(self._pages) * self._page + self._tokens * TOKEN_BYTES

    def fits(self, tokens: int) -> bool:
        """Whether a state of so many tokens is kept at all."""
        return self._row + -(-tokens // PAGE) * self._page + tokens * TOKEN_BYTES <= self._most

    def longest(self, tokens: Sequence[int]) -> Snapshot | None:
        """The longest snapshot that has seen the first of these tokens and not all of them; it counts as used."""
        most = min(len(tokens) - 1, max(self._lengths, default=0))
        for key in reversed([key for key in _chain(tokens[:most]) if key[0] in self._lengths]):
            snapshot = self._kept.get(key)
            if snapshot is not None and snapshot.tokens == tuple(tokens[: key[0]]):
                self._kept.move_to_end(key)
                return snapshot
        return None

    def marks(self, tokens: Sequence[int], seen: int) -> Collection[int]:
        """Where to take snapshots on the way through a prompt that goes on behind its first `seen` tokens."""
        chunk, last = self._engine.chunk, len(tokens) - 1
        shared = (key[0] for key in self._border_keys(tokens[:last]) if key in self._borders)
        doubling = (chunk << power for power in range((last // chunk).bit_length()))
        wanted = {last, max(shared, default=0), *doubling}
        return {mark for mark in wanted if mark > seen and self.fits(mark)}

    def keep(self, snapshot: Snapshot) -> int:
        """Take a snapshot over; returns how many had to leave for it. It is released when another one of the same
        tokens is here, or when it must leave itself."""
        length = len(snapshot.tokens)
        key = list(_chain(snapshot.tokens))[-1]
        if key in self._kept:
            self._kept.move_to_end(key)
        if key in self._kept or not self.fits(length):
            self._engine.release(snapshot)
            return 0
        before = len(self._kept)
        self._kept[key] = snapshot
        self._lengths[length] += 1
        self._pages.update(snapshot.pages)
        self._borders.update(self._border_keys(snapshot.tokens))
        self._tokens += length
        while self.bytes > self._most:
            self.evict()
        return before + 1 - len(self._kept)

    def evict(self) -> bool:
        """Let the snapshot go that was used longest ago; returns whether there was one."""
        if not self._kept:
            return False
        _, snapshot = self._kept.popitem(last=False)
        _take(self._lengths, [len(snapshot.tokens)])
        _take(self._pages, snapshot.pages)
        _take(self._borders, self._border_keys(snapshot.tokens))
        self._tokens -= len(snapshot.tokens)
        self._engine.release(snapshot)
        return True

    def _border_keys(self, tokens: Sequence[int]) -> Iterator[Key]:
        return (key for key in _chain(tokens) if key[0] % self._engine.chunk == 0)


def _chain(tokens: Sequence[int]) -> Iterator[Key]:
    """A key for each beginning of these tokens, the shortest first."""
    hashes = accumulate(tokens, lambda before, token: hash((before, token)), initial=0)
    next(hashes)
    return enumerate(hashes, 1)


def _take(counter: Counter, keys: Collection | Iterator) -> None:
    """The inverse of `update`, without a zero left."""
    for key in keys:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
