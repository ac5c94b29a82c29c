"""Carrying a tokenizer from one model folder to another: its files as they are, but for a BOS before every text."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from .tokens import beginning

_logger = logging.getLogger(__name__)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def carry_tokenizer(source: str | Path, target: str | Path) -> str | None:
    """Copy the tokenizer of a model folder, chat template included, into another.

    A published tokenizer may leave BOS to the chat template, which costs a plain text several nats a token. In the copy
    BOS comes first: its post-processor puts it there, and `add_bos_token` does not say otherwise. A tokenizer that
    names no BOS (Qwen's) and has no "<bos>" is copied as it is.

    Returns:
        The BOS, as text; None where there is none.

    Raises:
        ValueError: no tokenizer there, or one without the BOS that it names.
    """
    source, target = Path(source), Path(target)
    fields = _read_object(source / "tokenizer.json")
    settings_file = source / "tokenizer_config.json"
    settings = _read_object(settings_file) if settings_file.exists() else {}
    bos = settings.get("bos_token") or "<bos>"
    bos = bos["content"] if isinstance(bos, dict) else bos
    ids = [token["id"] for token in fields.get("added_tokens", []) if token["content"] == bos]
    if not ids and settings.get("bos_token"):
        raise ValueError(
            f"{source}: bos_token {bos!r} is not among the tokenizer's added tokens; name the right one in "
            "tokenizer_config.json"
        )
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if not ids:
        _logger.info("%s: the tokenizer names no BOS; it is carried as it is", source)
        return None
    if not _begins(fields.get("post_processor"), bos):
        bare = tokenizers.Tokenizer(models.BPE())
        bare.post_processor = beginning(bos, ids[0])
        fields["post_processor"] = json.loads(bare.to_str())["post_processor"]
        (target / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    if settings.get("add_bos_token") is False:
        changed = json.dumps(settings | {"add_bos_token": True}, indent=2, ensure_ascii=False)
        (target / "tokenizer_config.json").write_text(changed, encoding="utf-8")
    return bos


def _begins(processor: dict[str, Any] | None, bos: str) -> bool:
    """Whether a post-processor, or one of a sequence of them, puts `bos` first."""
    if processor is None:
        return False
    if processor["type"] == "Sequence":
        return any(_begins(part, bos) for part in processor["processors"])
    template = processor.get("single") or [{}]
    return processor["type"] == "TemplateProcessing" and template[0].get("SpecialToken", {}).get("id") == bos


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy the teacher's tokenizer files beside its weights") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a JSON object")
    return fields
