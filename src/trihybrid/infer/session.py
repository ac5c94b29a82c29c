"""Sessions: the state of a conversation as a file, to go on elsewhere.

A file is safetensors. Its tensors are those of a snapshot; its metadata is one JSON object, `session`: format, sha256
of the model and of the tokenizer, all tokens (the state has seen the first of them), and the messages of a chat.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.chat_prompt import Message
from trihybrid.infer.engine import Engine, Snapshot
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
        ValueError: no such file, no session, or one of another model, tokenizer or dtype.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a session is what /save has written")
    try:
        with safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        seen, tokens = record["tokens"][: record["seen"]], record["tokens"]
        if record["format"] != FORMAT:
            raise ValueError(f"{path}: format {record['format']} of a session; this version reads {FORMAT}")
        made_by = Identity(record["model"], record["tokenizer"])
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in record["messages"]]
    except (SafetensorError, LookupError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: not a whole session file; save it again") from None
    for name, ours, theirs in (
        ("model", wanted.model, made_by.model),
        ("tokenizer", wanted.tokenizer, made_by.tokenizer),
    ):
        if ours != theirs:
            raise ValueError(
                f"{path}: saved with another {name} (sha256 {theirs[:12]}, this one is {ours[:12]}); load it with its "
                "own"
            )
    return Session(engine.restore(seen, tensors), tokens, messages)


def whole_conversation(engine: Engine, sequence: int, messages: Sequence[Message] = ()) -> Session:
    """A sequence as it is, for `save_session`; the caller releases its snapshot."""
    return Session(engine.snapshot(sequence), engine.tokens_of(sequence), list(messages))
