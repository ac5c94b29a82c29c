"""Sessions: the state of a conversation as a file, to go on elsewhere.

A file is safetensors. Its tensors are those of a snapshot; its metadata is one JSON object, `session`: format, sha256
of the model and of the tokenizer, all tokens (the state has seen the first of them), and the messages of a chat.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.chat_prompt import Message
from trihybrid.infer.engine import Engine, Snapshot
from trihybrid.infer.paging import EngineFull
from trihybrid.storage.folder import entries_of

FORMAT = 1
KEY = "session"


@dataclass(frozen=True)
class Identity:
    """Which model and which tokenizer a state is of: sha256 of both, hexadecimal."""

    model: str
    tokenizer: str


@dataclass(frozen=True)
class Session:
    """A conversation.

    Attributes:
        snapshot: its state, in the engine that it was loaded into.
        tokens: all its tokens; at least one more than the state has seen.
        messages: the turns of a chat, none of a plain text.
    """

    snapshot: Snapshot
    tokens: list[int]
    messages: list[Message] = field(default_factory=list)


class _Turn(BaseModel):
    """A message as it lies in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str


class _Record(BaseModel):
    """The metadata of a file: see the module's docstring."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: int
    model: str
    tokenizer: str
    seen: Annotated[int, Field(ge=0)]
    tokens: list[Annotated[int, Field(ge=0)]]
    messages: list[_Turn]


def identity(folder: str | Path, tokenizer: TextTokenizer) -> Identity:
    """Of a model folder: over its config.json and its weights, by the manifest where the folder has one."""
    folder = Path(folder)
    names = sorted(["config.json", *(path.name for path in folder.glob("*.safetensors"))])
    text = json.dumps(entries_of(folder, names), sort_keys=True)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), tokenizer.hash)


def save_session(path: str | Path, engine: Engine, session: Session, made_by: Identity) -> int:
    """Write a session; an older file of that name is replaced once the new one is whole.

    Returns:
        bytes of the file: `session.snapshot.bytes` of tensors and a header.
    """
    path = Path(path)
    record = {
        "format": FORMAT,
        "model": made_by.model,
        "tokenizer": made_by.tokenizer,
        "seen": len(session.snapshot.tokens),
        "tokens": session.tokens,
        "messages": session.messages,
    }
    tensors = {name: tensor.contiguous() for name, tensor in engine.export(session.snapshot).items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial), metadata={KEY: json.dumps(record)})
    partial.rename(path)
    return path.stat().st_size


def load_session(path: str | Path, engine: Engine, wanted: Identity) -> Session:
    """Read a session into an engine; its snapshot is the caller's to release.

    Raises:
        EngineFull: no room for it.
        ValueError: no such file, no session, a damaged one, or one of another model, tokenizer or dtype.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a session is what /save has written")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {})[KEY]
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, LookupError):
        raise ValueError(f"{path}: not a whole session file; save it again") from None
    record = _read_record(path, text)
    _check_identity(path, record, wanted)
    _check_numbers(path, record, tensors, engine.vocabulary)
    messages = [Message(role=turn.role, content=turn.content) for turn in record.messages]
    try:
        snapshot = engine.restore(record.tokens[: record.seen], tensors)
    except EngineFull:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Session(snapshot, record.tokens, messages)


def whole_conversation(engine: Engine, sequence: int, messages: Sequence[Message] = ()) -> Session:
    """A sequence as it is, for `save_session`; the caller releases its snapshot."""
    return Session(engine.snapshot(sequence), engine.tokens_of(sequence), list(messages))


def _read_record(path: Path, text: str) -> _Record:
    try:
        record = _Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in (KEY, *first["loc"]))
        raise ValueError(f"{path}: {place}: {first['msg']}; the file is damaged, save it again") from None
    if record.format != FORMAT:
        raise ValueError(f"{path}: format {record.format} of a session; this version reads {FORMAT}")
    return record


def _check_identity(path: Path, record: _Record, wanted: Identity) -> None:
    for name, ours, theirs in (
        ("model", wanted.model, record.model),
        ("tokenizer", wanted.tokenizer, record.tokenizer),
    ):
        if ours != theirs:
            raise ValueError(
                f"{path}: saved with another {name} (sha256 {theirs[:12]}, this one is {ours[:12]}); load it with its "
                "own"
            )


def _check_numbers(path: Path, record: _Record, tensors: dict[str, Tensor], vocabulary: int) -> None:
    """Refuse what would fail only when the conversation goes on."""
    if record.seen >= len(record.tokens):
        raise ValueError(
            f"{path}: {KEY}.seen is {record.seen} of {len(record.tokens)} tokens, and at least one must be left; the "
            "file is damaged, save it again"
        )
    if max(record.tokens) >= vocabulary:
        raise ValueError(
            f"{path}: {KEY}.tokens holds {max(record.tokens)}; the vocabulary is 0 to {vocabulary - 1}; the file is "
            "damaged, save it again"
        )
    # In float32, for dtypes that are refused later need not know isfinite.
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise ValueError(
            f"{path}: {broken[0]} holds numbers that are not finite; the file is damaged, save it again"
        )
