"""What clients get: OpenAI's objects, whole or in chunks."""

import time
import uuid
from typing import Any, ClassVar

from trihybrid.infer.engine import Finish


def usage(prompt: int, chosen: int, cached: int) -> dict[str, Any]:
    """Counts of tokens: of the prompt, BOS and the template's included; of the answer, its end token included; of the
    prompt's, those that a kept state had seen."""
    counts = {"prompt_tokens": prompt, "completion_tokens": chosen, "total_tokens": prompt + chosen}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


class TextAnswer:
    """The answer of /v1/completions.

    Args:
        model: the name that the request gave.
    """

    prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: Finish, counts: dict[str, Any]) -> dict[str, Any]:
        """All of it."""
        choice = {"index": 0, **self._content(text), "finish_reason": finish, "logprobs": None}
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": counts}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that go before the text."""
        return []

    def piece(self, text: str, finish: Finish | None) -> dict[str, Any]:
        """A piece of the text; the last one tells why it ends."""
        return self._chunk([{"index": 0, **self._part(text), "finish_reason": finish, "logprobs": None}])

    def closing(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The usage, which goes behind the text on request."""
        return {**self._chunk([]), "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatAnswer(TextAnswer):
    """The answer of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}])]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
