"""What an engine holds and hands out: running sequences, chosen tokens, snapshots."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from trihybrid.infer.sampling import Sampling

Finish = Literal["stop", "length"]
PAGE = 64
"""Tokens of a page."""


@dataclass(frozen=True)
class Token:
    """A token that a step has chosen.

    Attributes:
        sequence: whose it is, as `add` named it.
        id: the token. A stop token is handed out too, with `finish` "stop".
        finish: None while the sequence goes on; "stop" after a stop token, "length" after `most` tokens.
    """

    sequence: int
    id: int
    finish: Finish | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a sequence behind its first `len(tokens)` tokens, for `Engine.add(prefix=...)` and session files.

    It shares its full pages of keys and values with whoever else has them and holds copies of the rest. It stays valid
    while sequences come and go, until `Engine.release`.

    Attributes:
        tokens: the tokens that the state has seen.
        bytes: of its tensors, shared pages included; what a session file of it holds.
        line: what its row held beside pages.
        pages: its pages, in order.
    """

    tokens: tuple[int, ...]
    bytes: int
    line: dict[str, Tensor] = field(repr=False)
    pages: list[int] = field(repr=False)


@dataclass(eq=False)
class Running:
    """One sequence: `seen` of its tokens are in its states; `spare` are pages set aside for snapshots at marks."""

    number: int
    tokens: list[int]
    end: int
    sampling: Sampling
    stops: frozenset[int]
    pages: list[int]
    spare: list[int]
    seen: int
    marks: list[int]
    finish: Finish | None = None
    collected: list[Snapshot] = field(default_factory=list)
