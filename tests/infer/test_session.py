"""A session goes on to the bit in another process; a file of another model, or a broken one, is refused."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

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


def test_a_failed_save_leaves_the_old_file(engine: Engine, folder: Path, tmp_path: Path) -> None:
    made_by, path = identity(folder, Tokenizer.bytes()), tmp_path / "talk.session"
    session = whole_conversation(engine, begin(engine))
    save_session(path, engine, session, made_by)
    data = path.read_bytes()
    engine.release(session.snapshot)
    with pytest.raises(ValueError, match="was released"):
        save_session(path, engine, session, made_by)
    assert path.read_bytes() == data
