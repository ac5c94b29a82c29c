"""A session goes on to the bit in another process; a file of another model, or a broken one, is refused."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from small_student import make_student
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.engine import Engine
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.session import identity, load_session, save_session, whole_conversation
from trihybrid.models.checkpoint import load_model

SAMPLING = Sampling(temperature=1.2, top_k=30, seed=4)
PROMPT = [(7 * place) % 57 + 3 for place in range(75)]
MESSAGES = [{"role": "user", "content": "gr\u00fc\u00df"}]
RESUME = """
import json, sys
import torch
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.engine import Engine
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.session import identity, load_session
from trihybrid.models.checkpoint import load_model
torch.set_num_threads(1)
folder, path, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = Engine(load_model(folder))
session = load_session(path, engine, identity(folder, Tokenizer.bytes()))
sampling = Sampling(temperature=1.2, top_k=30, seed=4)
sequence = engine.add(session.tokens, most=most, sampling=sampling, prefix=session.snapshot)
while engine.busy:
    engine.step()
tensors = engine.export(engine.snapshot(sequence))
bits = {name: tensor.contiguous().view(torch.uint8).flatten().tolist() for name, tensor in tensors.items()}
print(json.dumps([engine.tokens_of(sequence), bits, session.messages]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "student"
    make_student().save_pretrained(path)
    return path


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine(load_model(folder), rows=2)


def begin(engine: Engine, most: int = 12, steps: int = 5) -> int:
    sequence = engine.add(PROMPT, most=most, sampling=SAMPLING)
    for _ in range(steps):
        engine.step()
    return sequence


def test_another_process_goes_on_to_the_bit(engine: Engine, folder: Path, tmp_path: Path) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    sequence = begin(engine)
    session = whole_conversation(engine, sequence, MESSAGES)
    stated = session.snapshot.bytes
    size = save_session(path, engine, session, made_by)
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()
        tensors = [file.get_tensor(name) for name in names]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert stated == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert size == path.stat().st_size == stated + header + 8
    while engine.busy:
        engine.step()
    wanted = engine.export(engine.snapshot(sequence))

    most = len(engine.tokens_of(sequence)) - len(session.tokens)
    command = [sys.executable, "-c", RESUME, str(folder), str(path), str(most)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    tokens, bits, messages = json.loads(output.stdout)
    assert (tokens, messages) == (engine.tokens_of(sequence), MESSAGES)
    assert bits == {
        name: tensor.contiguous().view(torch.uint8).flatten().tolist() for name, tensor in wanted.items()
    }


def test_another_model_or_tokenizer_is_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    save_session(path, engine, whole_conversation(engine, begin(engine)), made_by)
    free = engine.memory()["used"]
    for other, name in (
        (replace(made_by, model="0" * 64), "model"),
        (replace(made_by, tokenizer="1" * 64), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=f"saved with another {name} .*load it with its own"):
            load_session(path, engine, other)
    assert engine.memory()["used"] == free


def test_the_identity_follows_weights_and_configuration(folder: Path, tmp_path: Path) -> None:
    before = identity(folder, Tokenizer.bytes())
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    assert before.model == hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    assert before.tokenizer == Tokenizer.bytes().hash
    for name, data in files.items():
        for place, content in files.items():
            (tmp_path / place).write_bytes(content)
        (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert identity(tmp_path, Tokenizer.bytes()).model != before.model


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "plain"])
def test_a_broken_file_is_refused(engine: Engine, folder: Path, tmp_path: Path, damage: str) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    save_session(path, engine, whole_conversation(engine, begin(engine)), made_by)
    data = path.read_bytes()
    weights = (folder / "model.safetensors").read_bytes()
    path.write_bytes(
        {"cut": data[:-9], "text": b"hello, this is text", "empty": b"", "plain": weights}[damage]
    )
    with pytest.raises(ValueError, match="not a whole session file; save it again"):
        load_session(path, engine, made_by)
    with pytest.raises(ValueError, match="no such file"):
        load_session(tmp_path / "none", engine, made_by)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], str | None]) -> None:
    """Change a session's record and tensors in place; a string becomes the record's text."""
    with safe_open(str(path), framework="pt") as file:
        record = json.loads(file.metadata()["session"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    text = change(record, tensors)
    save_file(tensors, str(path), metadata={"session": json.dumps(record) if text is None else text})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", None, "session.model: Input should be a valid string"),
        ("tokens", ["3"] * len(PROMPT), "session.tokens.0: Input should be a valid integer"),
        ("tokens", [3.0] * len(PROMPT), "session.tokens.0: Input should be a valid integer"),
        ("tokens", [-1] * len(PROMPT), "session.tokens.0: Input should be greater than or equal to 0"),
        ("tokens", [61] * (len(PROMPT) + 9), "session.tokens holds 61; the vocabulary is 0 to 60"),
        ("tokens", PROMPT[:9], "of 9 tokens, and at least one must be left"),
        ("seen", -1, "session.seen: Input should be greater than or equal to 0"),
        ("seen", 7, "this model's state of 7 tokens has"),
        (
            "messages",
            [{"role": 5, "content": ""}],
            "session.messages.0.role: Input should be 'system', 'user'",
        ),
        ("messages", [{"role": "user"}], "session.messages.0.content: Field required"),
        ("other", 1, "session.other: Extra inputs are not permitted"),
        ("format", 2, "format 2 of a session; this version reads 1"),
    ],
)
def test_a_damaged_record_is_refused(
    engine: Engine, folder: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    save_session(path, engine, whole_conversation(engine, begin(engine)), made_by)
    rewrite(path, lambda record, tensors: record.update({field: value}))
    held = engine.memory()["used"]
    with pytest.raises(ValueError) as caught:
        load_session(path, engine, made_by)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and engine.memory()["used"] == held


def test_a_record_that_is_too_deep_or_no_numbers_are_refused(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    save_session(path, engine, whole_conversation(engine, begin(engine)), made_by)
    rewrite(
        path, lambda record, tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(torch.nan) and None
    )
    with pytest.raises(ValueError, match=r"talk\.session: .* holds numbers that are not finite"):
        load_session(path, engine, made_by)
    rewrite(path, lambda record, tensors: "[" * 100_000)
    with pytest.raises(ValueError, match=r"talk\.session: session: Invalid JSON: .*save it again"):
        load_session(path, engine, made_by)


def test_a_failed_save_leaves_the_old_file(engine: Engine, folder: Path, tmp_path: Path) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    session = whole_conversation(engine, begin(engine))
    save_session(path, engine, session, made_by)
    data = path.read_bytes()
    engine.release(session.snapshot)
    with pytest.raises(ValueError, match="was released"):
        save_session(path, engine, session, made_by)
    assert path.read_bytes() == data
