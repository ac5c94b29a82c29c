"""`trihybrid serve` as a user starts and ends it."""

import http.client
import json
import signal
import socket
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from small_student import make_student
from trihybrid.cli import serving
from trihybrid.data.tokens import Tokenizer
from trihybrid.infer import speed, states, weights

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "student"
    make_student(vocabulary=260).save_pretrained(folder)
    Tokenizer.bytes().save(folder)
    return folder


@pytest.mark.long  # tests/infer/server/test_shutdown.py holds the same in one process
def test_a_real_signal_lets_the_running_answer_finish(micro: ModuleType, model: Path) -> None:
    """The process ends with exit code 0, and its stream with [DONE]."""
    process = micro.start("serve", model, "--port", 0, "--context", 400, "--grace", 60)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{model}: http://127.0.0.1:"), process.stderr.read()
        port = int(line.rsplit(":", 1)[1].removesuffix("/v1\n"))
        body = {
            "model": "student",
            "prompt": "the slow ",
            "max_tokens": 115,
            "stream": True,
            "temperature": 0,
        }
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), JSON)
            answer = connection.getresponse()
            first = answer.readline()
            process.send_signal(signal.SIGTERM)
            events = (first + answer.read()).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert len(events) > 80
        assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        rest = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, ("", ""))
    finally:
        process.kill()
        process.communicate()


def test_without_the_extra_it_says_which(micro: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else object())
    line = micro.refusal(micro.trihybrid("serve", "nowhere"))
    assert line == "error: serve needs uvicorn: pip install 'trihybrid[serving]'"


def test_what_cannot_be_served_is_refused(micro: ModuleType, model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (("serve", tmp_path / "nothing", "--port", 0), "nothing"),
            (
                ("serve", model, "--port", port),
                f"cannot listen on 127.0.0.1 port {port}: Address already in use",
            ),
            (
                ("serve", model, "--port", 0, "--api-key-file", tmp_path / "key"),
                "no key; it must be one line",
            ),
            (("serve", model, "--port", 0, "--device", "nowhere"), 'device is "nowhere"'),
        ]
        for command, message in cases:
            assert message in micro.refusal(micro.trihybrid(*command))


@pytest.mark.parametrize(
    "command", [("chat",), ("serve", "--port", 0), ("bench", "--batch", 1), ("generate", "once upon")]
)
def test_weights_that_need_torchao_are_refused_without_it(
    micro: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch, command: tuple
) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    line = micro.refusal(micro.trihybrid(command[0], model, *command[1:], "--weights", "int8"))
    assert line == "error: weights is \"int8\", which needs torchao: pip install 'trihybrid[quantize]'"


def test_a_million_tokens_are_refused_in_bytes(
    micro: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "free_bytes", lambda device: 2**20)
    line = micro.refusal(micro.trihybrid("bench", model, "--context", 1_000_000, "--batch", 1))
    assert "tokens is 1,000,096, of 64: together 0.06 GiB of cpu, where 0.00 GiB are free" in line


def test_what_ends_a_bench_is_found_before_it_measures(
    micro: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: object, **options: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(speed, "measure_speed", measured)
    file = tmp_path / "file"
    file.touch()
    for options, message in (
        (("--out", file), f"--out {file}: {file} is a file; name a folder"),
        (("--out", file / "below" / "it"), f"{file} is a file; name a folder"),
        (("--teacher", tmp_path / "nowhere"), f"--teacher {tmp_path / 'nowhere'}: no config.json there"),
        (("--device", "foo"), 'device is "foo", here it may be cpu'),
        (("--device", "cuda:99"), 'device is "cuda:99", here it may be cpu'),
    ):
        assert message in micro.refusal(micro.trihybrid("bench", model, *options))
