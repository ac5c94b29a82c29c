"""The model that is served: its name, and how requests become its tokens."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.chat_prompt import ChatPrompt, has_chat_template
from trihybrid.infer.server.limits import Limits, Refusal
from trihybrid.infer.server.protocol import ChatRequest, CompletionRequest
from trihybrid.infer.server.scheduler import Work


class Served:
    """A model folder as the server sees it.

    Args:
        folder: with a chat template where it has one.
        tokenizer: of that folder.
        vocabulary: how many tokens the model knows.
        ends: tokens that end an answer.
        name: by which requests call it.
        limits: of a prompt and its answer.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: TextTokenizer,
        vocabulary: int,
        ends: frozenset[int],
        name: str,
        limits: Limits,
    ) -> None:
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self._vocabulary, self._ends = vocabulary, ends
        self._chat = ChatPrompt(folder) if has_chat_template(folder) else None
        # One thread, since tokenizers of transformers are not for several; long prompts must not hold the event loop.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def close(self) -> None:
        """Wait for the thread that encodes prompts."""
        self._encoding.shutdown()

    async def work(self, asked: CompletionRequest | ChatRequest) -> Work:
        """What a request asks of the engine.

        Raises:
            Refusal: another model, or a request that the model or the limits do not allow.
        """
        if asked.model != self.name:
            raise Refusal(
                404, "model_not_found", f'model is "{asked.model}"; this server has "{self.name}"', "model"
            )
        sampling, stops = asked.sampling(), asked.stops
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self._encoding, self._encode, asked)
        return Work(tokens, self._most(len(tokens), asked.most), sampling, self._ends, stops)

    def _encode(self, asked: CompletionRequest | ChatRequest) -> list[int]:
        if isinstance(asked, ChatRequest):
            if self._chat is None:
                raise Refusal(
                    400,
                    "no_chat_template",
                    f'"{self.name}" has no chat template; use /v1/completions',
                    "messages",
                )
            try:
                return self._chat.encode([message.plain() for message in asked.messages])
            except ValueError as error:
                raise Refusal(400, "invalid_value", str(error), "messages") from None
        if isinstance(asked.prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(asked.prompt)]
        if not asked.prompt or not 0 <= min(asked.prompt) <= max(asked.prompt) < self._vocabulary:
            raise Refusal(
                400,
                "invalid_value",
                f"prompt: token ids, at least one, each in 0 to {self._vocabulary - 1}",
                "prompt",
            )
        return asked.prompt

    def _most(self, prompt: int, asked: int | None) -> int:
        """How long the answer may become."""
        room = self.limits.context - prompt
        if room < (asked or 1):
            raise Refusal(
                400,
                "context_length_exceeded",
                f"the prompt has {prompt:,} tokens and {asked or 1:,} more are asked for; this server allows "
                f"{self.limits.context:,} in all: shorten the prompt, or ask for fewer",
            )
        return min(room, self.limits.new_tokens) if asked is None else asked
