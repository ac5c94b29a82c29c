"""Who holds which page: numbers of free pages, and how many hold each of the others."""

import heapq
import logging

from trihybrid.infer.states import States

logger = logging.getLogger(__name__)


class EngineFull(ValueError):
    """No free row, or no room for the tokens that a sequence may come to hold. Nothing was changed; try again later."""


class PageBook:
    """Gives out pages of `states`, lowest numbers first, so that a sequence mostly gets one run of them.

    Page 0 is given to nobody: rows of a batch that hold no sequence write there.

    Args:
        states: whose pages these are.
        tokens: how many tokens the pages hold together; None grows as needed, by doubling.
    """

    def __init__(self, states: States, tokens: int | None) -> None:
        self._states = states
        self.length = states.length
        self.limit = None if tokens is None else -(-tokens // self.length)
        self._free: list[int] = []
        self._holders: dict[int, int] = {}
        self._grow(1 + (8 if self.limit is None else self.limit))

    def _grow(self, capacity: int) -> None:
        first = max(1, self._states.capacity)
        self._states.grow(capacity)
        for page in range(first, capacity):
            heapq.heappush(self._free, page)

    @property
    def free(self) -> int | None:
        """Pages that can still be taken; None where there is no limit."""
        return None if self.limit is None else len(self._free)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens of a sequence take; 0 in a model where nothing grows."""
        return -(-tokens // self.length) if self._states.pages else 0

    def take(self, count: int) -> list[int]:
        """`count` cleared pages, each with one holder.

        Raises:
            EngineFull: fewer are free.
        """
        if count > len(self._free):
            if self.limit is not None:
                raise EngineFull(
                    f"{count * self.length:,} more tokens of keys and values do not fit: "
                    f"{len(self._free) * self.length:,} of {self.limit * self.length:,} are free"
                )
            needed = self._states.capacity + count - len(self._free)
            doubled = max(2 * self._states.capacity, needed)
            capacity = doubled if self._states.shortage(doubled) is None else needed
            if (shortage := self._states.shortage(capacity)) is not None:
                raise EngineFull(f"{shortage}; shorten the prompt, or ask for fewer tokens")
            self._grow(capacity)
            logger.info("keys and values: grown to %d pages of %d tokens", capacity - 1, self.length)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        if pages:
            self._states.clear_pages(pages)
        self._holders |= dict.fromkeys(pages, 1)
        return pages

    def share(self, pages: list[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._holders[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One holder fewer for each; pages that nobody holds are free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                heapq.heappush(self._free, page)
