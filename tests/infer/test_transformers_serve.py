"""`transformers serve` answers with a student as our engine does."""

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from small_student import make_student
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer import transformers_serve
from trihybrid.infer.chat_prompt import ChatPrompt, Message
from trihybrid.infer.engine import Engine
from trihybrid.models.checkpoint import load_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [Message(role="user", content="abc")]
MOST, PATIENCE = 12, 120


def test_what_is_missing_and_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_serve, "find_spec", lambda name: None if name == "fastapi" else object())
    with pytest.raises(
        ValueError, match=r"serve needs fastapi: pip install 'trihybrid\[transformers-serving\]'"
    ):
        transformers_serve.check([])
    monkeypatch.setattr(transformers_serve, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "argv", ["x", "serve", "folder", "--continuous-batching"])
    with pytest.raises(SystemExit, match="error: --continuous-batching: it pages keys and values and has no"):
        transformers_serve.main()


def make_folder(folder: Path) -> None:
    """A student over bytes whose greedy answers are letters: the head's rows of all other tokens are zero."""
    model, tokenizer = make_student(vocabulary=260), Tokenizer.bytes()
    letters = torch.zeros(260, dtype=torch.bool)
    letters[tokenizer.encode("abcdefghijklmnopqrstuvwxyz")] = True
    with torch.no_grad():
        model.get_output_embeddings().weight[~letters] = 0
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def ask(port: int, method: str, path: str, body: dict | None = None) -> dict:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())


def wait(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            ask(port, "GET", "/health")
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.mark.long
@pytest.mark.skipif(
    any(find_spec(name) is None for name in transformers_serve.NEEDED),
    reason="needs the extra transformers-serving",
)
def test_a_chat_is_answered_with_the_tokens_of_the_engine(tmp_path: Path) -> None:
    folder, log = tmp_path / "student", tmp_path / "log"
    make_folder(folder)
    engine = Engine(load_model(folder))
    prompt = ChatPrompt(folder).encode(TALK)
    sequence = engine.add(prompt, most=MOST)
    while engine.busy:
        engine.step()
    wanted = Tokenizer.from_file(folder).decode(engine.tokens_of(sequence)[len(prompt) :])
    assert len(wanted) == MOST and wanted.isalpha() and len(set(wanted)) > 5
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trihybrid.infer.transformers_serve", "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait(process, port, log)
            body = {"model": str(folder), "messages": TALK, "temperature": 0, "max_tokens": MOST}
            answer = ask(port, "POST", "/v1/chat/completions", body)
        finally:
            process.kill()
            process.wait()
    assert answer["choices"][0]["message"]["content"] == wanted, log.read_text()
    assert answer["usage"]["prompt_tokens"] == len(prompt)
