"""Carrying a tokenizer from one model folder to another: its files as they are, but for a BOS before every text."""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import models

from .tokens import Tokenizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def carry_tokenizer(source: str | Path, target: str | Path) -> Tokenizer:
    """Copy the tokenizer of a model folder, chat template included, into another.

    A published tokenizer may leave BOS to the chat template, which costs a plain text several nats a token. In the copy
    BOS comes first: its post-processor puts it there, and `add_bos_token` does not say otherwise.

    Returns:
        The tokenizer.

    Raises:
        ValueError: no tokenizer there; see `Tokenizer.from_file`.
    """
    source, target = Path(source), Path(target)
    tokenizer = Tokenizer.from_file(source)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if not tokenizer.begins:
        fields = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        bare = tokenizers.Tokenizer(models.BPE())
        bare.post_processor = tokenizer.beginning()
        fields["post_processor"] = json.loads(bare.to_str())["post_processor"]
        (target / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    config = target / "tokenizer_config.json"
    if config.exists():
        settings = json.loads(config.read_text(encoding="utf-8"))
        if settings.get("add_bos_token") is False:
            config.write_text(json.dumps(settings | {"add_bos_token": True}, indent=2), encoding="utf-8")
    return tokenizer
