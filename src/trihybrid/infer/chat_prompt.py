"""Conversations as prompts, by the chat template that came with the tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict


class Message(TypedDict):
    """One turn: role is `system`, `user` or `assistant`."""

    role: str
    content: str


class ChatPrompt:
    """The chat template of a model folder (tokenizer_config.json or chat_template.jinja).

    Raises:
        ValueError: the folder has none.
    """

    def __init__(self, folder: str | Path) -> None:
        raise NotImplementedError

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, up to where the assistant's next words begin; BOS where the template has it.

        Raises:
            ValueError: the template refuses the messages (an unknown role, a wrong order).
        """
        raise NotImplementedError
