"""A conversation with a model: turns by the chat template where there is one, else one text that both go on with.

What was said stays in the engine as a snapshot, so that a turn reads what is new alone. A template may write an answer
otherwise than the model's own tokens had it; then the snapshot does not fit, and the conversation is read anew.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.chat_prompt import ChatPrompt, Message
from trihybrid.infer.engine import Engine, Snapshot
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.session import Identity, Session, load_session, save_session
from trihybrid.infer.text_stream import TextStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """Of the last answer: tokens read and chosen, and the seconds of both."""

    read: int = 0
    chosen: int = 0
    reading: float = 0.0
    choosing: float = 0.0


class Chat:
    """One conversation.

    Args:
        engine: one with a free row.
        tokenizer: the model's.
        prompt: its chat template, or None to go on with plain text.
        ends: tokens that end an answer.
        most: tokens of an answer, at most.
        sampling: how they are chosen.
        system: what the conversation begins with, where the template has such a role; "" for nothing.

    Attributes:
        messages: the turns so far.
        speed: of the last answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        prompt: ChatPrompt | None,
        ends: set[int],
        most: int,
        sampling: Sampling,
        system: str = "",
    ) -> None:
        self._engine, self._tokenizer, self._prompt, self._ends = engine, tokenizer, prompt, ends
        self._most, self._sampling, self._system = most, sampling, system
        self._snapshot: Snapshot | None = None
        self._interrupted = False
        self.tokens: list[int] = []
        self.speed = Speed()
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._replace(None, [])
        self.speed = Speed()
        self.messages = [Message(role="system", content=self._system)] if self._system else []

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces as they come. Broken off by `interrupt`, it counts as far as it came."""
        self._interrupted = False
        self.messages.append(Message(role="user", content=text))
        try:
            tokens = self._encode(text)
            prefix = self._snapshot
            if prefix is not None and tuple(tokens[: len(prefix.tokens)]) != prefix.tokens:
                logger.info("the template writes the conversation otherwise; all of it is read again")
                prefix = None
            sequence = self._engine.add(
                tokens, most=self._most, sampling=self._sampling, stops=self._ends, prefix=prefix
            )
        except BaseException:
            # What was refused was not said.
            self.messages.pop()
            raise
        stream, answer = TextStream(self._tokenizer), ""
        began = first = time.perf_counter()
        chosen = 0
        try:
            while self._engine.busy and not self._interrupted:
                for token in self._engine.step():
                    chosen += 1
                    first = time.perf_counter() if chosen == 1 else first
                    piece = "" if token.id in self._ends else stream.push(token.id)
                    answer += piece
                    if piece:
                        yield piece
            answer += (rest := stream.finish())
            if rest:
                yield rest
        finally:
            read = len(tokens) - (0 if prefix is None else len(prefix.tokens))
            self.speed = Speed(read, chosen, first - began, time.perf_counter() - first)
            self.messages.append(Message(role="assistant", content=answer))
            if chosen:
                self._replace(self._engine.snapshot(sequence), self._engine.tokens_of(sequence))
            self._engine.remove(sequence)

    def interrupt(self) -> None:
        """End the answer after the step that runs now; for signal handlers."""
        self._interrupted = True

    def _encode(self, text: str) -> list[int]:
        if self._prompt is not None:
            return self._prompt.encode(self.messages)
        begun = self.tokens or [self._tokenizer.bos_id, *self._tokenizer.encode(self._system)]
        return begun + self._tokenizer.encode(text)

    def _replace(self, snapshot: Snapshot | None, tokens: list[int]) -> None:
        if self._snapshot is not None:
            self._engine.release(self._snapshot)
        self._snapshot, self.tokens = snapshot, tokens

    @property
    def state_bytes(self) -> int:
        """Bytes of the conversation's state, and of a session file but for its header; 0 before the first answer."""
        return 0 if self._snapshot is None else self._snapshot.bytes

    def save(self, path: str | Path, made_by: Identity) -> int:
        """Write the conversation; returns the bytes of the file.

        Raises:
            ValueError: nothing was said yet.
        """
        if self._snapshot is None:
            raise ValueError("nothing was said yet; there is no state to save")
        return save_session(path, self._engine, Session(self._snapshot, self.tokens, self.messages), made_by)

    def load(self, path: str | Path, made_by: Identity) -> None:
        """Go on with a conversation from a file in place of this one. Errors as of `load_session` leave this one."""
        session = load_session(path, self._engine, made_by)
        self._replace(session.snapshot, session.tokens)
        self.messages, self.speed = list(session.messages), Speed()


def end_tokens(model: PreTrainedModel, tokenizer: TextTokenizer) -> set[int]:
    """Tokens that end an answer: of the tokenizer, and those that the model's generation settings name (a chat model's
    end of a turn)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    return {tokenizer.eos_id, tokenizer.bos_id, *listed}
