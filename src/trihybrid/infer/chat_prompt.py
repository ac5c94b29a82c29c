"""Conversations as prompts, by the chat template that came with the tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from trihybrid.data.tokens import NOT_UNICODE


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
        if not has_chat_template(folder):
            raise ValueError(
                f"{folder}: no chat template; put chat_template.jinja into the folder, or continue plain text"
            )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, up to where the assistant's next words begin; BOS where the template has it.

        Raises:
            ValueError: the template refuses the messages (an unknown role, a wrong order), or they are no Unicode.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        # The template writes special tokens itself.
        try:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except TypeError:
            raise ValueError(NOT_UNICODE) from None


def has_chat_template(folder: str | Path) -> bool:
    """Whether the tokenizer of a model folder came with a chat template."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
