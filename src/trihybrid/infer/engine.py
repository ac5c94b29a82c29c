"""The engine: many sequences of one model over states that it owns; they join, advance together and leave.

    engine = Engine(model, rows=8, tokens=65_536)
    sequence = engine.add(prompt_ids, most=200, sampling=Sampling(temperature=0.7, seed=1), stops={eos_id})
    while engine.busy:
        for token in engine.step():
            ...                       # token.sequence, token.id, token.finish
    engine.remove(sequence)

One thread calls it. Legend: B sequences, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from trihybrid.infer.sampling import Sampling

Execution = Literal["eager", "compiled", "graph"]
Finish = Literal["stop", "length"]


class EngineFull(ValueError):
    """No free row, or no room for the tokens that a sequence may come to hold. Nothing was changed; try again later."""


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


class Snapshot:
    """The state of a sequence behind its first `len(tokens)` tokens, for `Engine.add(prefix=...)` and for session files.

    It shares its full pages of keys and values with whoever else has them and holds copies of the rest. It stays valid
    while sequences come and go, until `Engine.release`.

    Attributes:
        tokens: the tokens that the state has seen.
        bytes: of its tensors, shared pages included; what a session file of it holds.
    """

    tokens: tuple[int, ...]
    bytes: int


class Engine:
    """A teacher or a student over preallocated states.

    Args:
        model: any teacher or student of `models.families`, on its device, in its dtype. The engine takes it over: eval
            mode, no gradients; nobody else may train or move it.
        rows: how many sequences it holds at a time, at least 1.
        tokens: tokens that all sequences and snapshots together may store in layers that grow; None grows as needed.
        chunk: most tokens of prompts that one step works on. A longer prompt takes several steps, between which the
            others advance.
        execution: how a decoding step runs. `eager` launches operator by operator, `compiled` through torch.compile,
            `graph` compiled and replayed as one CUDA graph.

    Attributes:
        vocabulary: V.

    Raises:
        ValueError: a number out of range; an execution that the device or the model cannot have, with the reason.
    """

    vocabulary: int

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = 1,
        tokens: int | None = None,
        chunk: int = 512,
        execution: Execution = "eager",
    ) -> None:
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether a step would do anything: a sequence waits for its prompt or is not finished."""
        raise NotImplementedError

    @property
    def free_rows(self) -> int:
        """How many more sequences `add` takes now."""
        raise NotImplementedError

    @property
    def free_tokens(self) -> int | None:
        """How many more tokens can be stored; None where storage grows as needed."""
        raise NotImplementedError

    def add(
        self,
        tokens: Sequence[int],
        *,
        most: int,
        sampling: Sampling = Sampling(),
        stops: Collection[int] = (),
        prefix: Snapshot | None = None,
        marks: Collection[int] = (),
    ) -> int:
        """Let a sequence join; its prompt is worked on by the next steps.

        Args:
            tokens: all tokens that it begins with, those of `prefix` included, at least one, each in 0 to V - 1.
            most: how many tokens to choose at most, at least 1. Room for all of them is set aside now.
            sampling: how they are chosen.
            stops: tokens that end it.
            prefix: a state that has seen the first of these tokens, at least one fewer than all.
            marks: numbers of tokens behind which a snapshot is to be taken on the way through the prompt, each above
                the prefix and below `len(tokens)`; see `collect`.

        Returns:
            a number that names it in `Token.sequence` and in the calls below, never used twice.

        Raises:
            EngineFull: no room now. A sequence that could never fit is a plain ValueError.
            ValueError: an argument out of range; tokens that do not begin with those of the prefix.
        """
        raise NotImplementedError

    def step(self) -> list[Token]:
        """Work on at most `chunk` tokens of waiting prompts, then let every sequence that is ready choose one token.

        Returns:
            the tokens chosen, at most one a sequence. A finished sequence keeps its row and state until `remove`, so
            that a snapshot can be taken of it, and takes no further part.
        """
        raise NotImplementedError

    def remove(self, sequence: int) -> None:
        """Let a sequence leave, finished or not, at once. ValueError for one that is not there."""
        raise NotImplementedError

    def tokens_of(self, sequence: int) -> list[int]:
        """All its tokens, prompt and chosen. ValueError for one that is not there."""
        raise NotImplementedError

    def snapshot(self, sequence: int) -> Snapshot:
        """The state of a sequence as it is: behind all its tokens but the last, which no step has read yet; in the
        middle of a prompt, behind those that were worked on.

        Raises:
            EngineFull: no page is left for the copy of its last one.
            ValueError: it is not there, or nothing of its prompt was worked on.
        """
        raise NotImplementedError

    def collect(self, sequence: int) -> list[Snapshot]:
        """Hand over the snapshots taken at its `marks` since the last call, in their order; the caller releases them.
        Those that nobody collected leave with the sequence."""
        raise NotImplementedError

    def release(self, snapshot: Snapshot) -> None:
        """Give back what a snapshot holds. ValueError when that was done already, or for one of another engine."""
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        """Bytes: `weights`; `rows` (what every row holds at any length); `token` (one more token); `pages` (storage
        that grows, as allocated); `used` (the part of it that sequences and snapshots hold)."""
        raise NotImplementedError
