"""What goes wrong has an answer of its own, and the next request finds the server as it was."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from running_server import NAME, PATIENCE, Running, request, run, wait
from trihybrid.infer import states
from trihybrid.infer.sampling import Sampling

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
JSON = {"Content-Type": "application/json"}


def error(answer: tuple[int, Any]) -> tuple[int, str, str]:
    """Status, code and message."""
    status, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]["code"], body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"model": "other"}, 404, "model_not_found", 'model is "other"; this server has "tiny"'),
        ({"max_tokens": "8"}, 400, "invalid_type", "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 0}, 400, "invalid_type", "max_tokens: Input should be greater than or equal to 1"),
        ({"stream": "yes"}, 400, "invalid_type", "stream: Input should be a valid boolean"),
        (
            {"stop": 3},
            400,
            "invalid_type",
            "stop: Input should be a valid string; or Input should be a valid array",
        ),
        ({"stop": ["a", ""]}, 400, "invalid_value", "stop: a stop string is empty; leave it away"),
        ({"prompt": None}, 400, "invalid_type", "prompt: Input should be a valid string; or Input should be"),
        ({"prompt": [3, 260]}, 400, "invalid_value", "prompt: token ids, at least one, each in 0 to 259"),
        ({"prompt": []}, 400, "invalid_value", "prompt: token ids, at least one"),
        ({"temperature": -1}, 400, "invalid_value", "temperature is -1"),
        ({"top_p": 0}, 400, "invalid_value", "top_p is 0"),
        ({"repetition_penalty": 1e-300}, 400, "invalid_value", "repetition_penalty is 1e-300"),
        ({"seed": -1}, 400, "invalid_value", "seed is -1"),
        ({"n": 2}, 400, "invalid_type", "n: Input should be less than or equal to 1"),
        ({"presence_penalty": 0.5}, 400, "invalid_type", "presence_penalty: Input should be less than"),
        ({"tools": []}, 400, "unknown_field", "tools: this server has no such field; leave it away"),
        ({"stream_options": {}}, 400, "invalid_value", "stream_options: they need stream: true"),
        (
            {"prompt": "x" * 512},
            400,
            "context_length_exceeded",
            "the prompt has 513 tokens and 8 more are asked for; this server allows 512 in all",
        ),
        ({"max_tokens": 506}, 400, "context_length_exceeded", "the prompt has 7 tokens and 506 more"),
    ],
)
def test_a_request_that_cannot_be(
    shared: Running, fields: dict, status: int, code: str, message: str
) -> None:
    found = error(shared.ask(**fields))
    assert found[:2] == (status, code)
    assert message in found[2]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b'{"model": "tiny",', "invalid_json", "the body is not JSON: Invalid JSON: EOF"),
        (b"", "invalid_json", "the body is not JSON"),
        (b'{"model": "\xff"}', "invalid_json", "the body is not JSON"),
        (b"[" * 50_000, "invalid_json", "the body is not JSON: Invalid JSON: recursion limit"),
        (b"[1]", "invalid_type", "the body is not a JSON object"),
        (b"{}", "invalid_type", "model: Field required"),
        (
            json.dumps(CHAT | {"messages": [{"role": "robot", "content": "x"}]}).encode(),
            "invalid_type",
            "messages.0.role: Input should be 'system', 'user' or 'assistant'",
        ),
        (json.dumps(CHAT | {"messages": []}).encode(), "invalid_type", "messages: List should have at least"),
        (
            json.dumps(CHAT | {"messages": [{"role": "user", "content": 3}]}).encode(),
            "invalid_type",
            "messages.0.content: Input should be a valid string; or Input should be a valid array",
        ),
    ],
)
def test_a_body_that_cannot_be(shared: Running, body: bytes, code: str, message: str) -> None:
    found = error(shared.send("POST", "/v1/chat/completions", body))
    assert found[:2] == (400, code)
    assert message in found[2]


def test_a_temperature_near_zero_is_the_likeliest_token(shared: Running) -> None:
    answers = [shared.ask(temperature=temperature, top_k=5) for temperature in (0.0, 1e-320)]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["choices"] == answers[1][1]["choices"]


def test_a_body_of_another_type(shared: Running) -> None:
    body = json.dumps(request()).encode()
    found = error(shared.send("POST", "/v1/completions", body, **{"Content-Type": "text/plain"}))
    assert found == (
        415,
        "unsupported_media_type",
        'the body must be JSON: send "Content-Type: application/json"',
    )


def test_a_huge_body_is_dropped_and_told(shared: Running) -> None:
    """64 KiB and 32 bytes a token of 512; ten times that is sent, in one piece and in chunks of no stated length."""
    body = json.dumps(request(prompt="x" * 819_200)).encode()
    wanted = (413, "body_too_large", f"the body has {len(body):,} bytes; this server reads 81,920")
    assert error(shared.send("POST", "/v1/completions", body)) == wanted
    with closing(shared.connect()) as connection:
        pieces = (body[place : place + 8192] for place in range(0, len(body), 8192))
        connection.request("POST", "/v1/completions", pieces, JSON)
        answer = connection.getresponse()
        assert error((answer.status, json.loads(answer.read()))) == wanted


def test_what_is_not_here(shared: Running) -> None:
    assert error(shared.send("GET", "/v1/nothing"))[:2] == (404, "not_found")
    assert error(shared.send("GET", "/v1/completions"))[:2] == (405, "not_found")


def test_refusals_are_counted(shared: Running) -> None:
    name = "trihybrid_requests_total /v1/completions 404"
    before = shared.samples().get(name, 0)
    for _ in range(3):
        shared.ask(model="other")
    assert shared.samples()[name] == before + 3


def test_a_folder_without_a_template_has_no_chat(served_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    for path in served_folder.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    with run(folder) as running:
        found = error(running.send("POST", "/v1/chat/completions", CHAT))
        assert found == (400, "no_chat_template", '"tiny" has no chat template; use /v1/completions')
        assert running.ask(max_tokens=1)[0] == 200


@pytest.fixture
def guarded(served_folder: Path) -> Iterator[Running]:
    with run(served_folder, key="Secret-1") as running:
        yield running


def test_only_who_has_the_key_is_served(guarded: Running) -> None:
    body = json.dumps(request(max_tokens=1)).encode()
    for wrong in ({}, {"Authorization": "Bearer secret-1"}, {"Authorization": "Secret-1"}):
        found = error(guarded.send("POST", "/v1/completions", body, **wrong))
        assert found == (401, "invalid_api_key", 'no valid API key; send "Authorization: Bearer KEY"')
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        guarded.client(api_key="wrong").models.list()
    assert guarded.client().models.list().data[0].id == NAME
    assert guarded.send("GET", "/health")[0] == 200
    assert guarded.samples()["trihybrid_requests_total /v1/completions 401"] == 3


def test_a_full_queue_refuses_and_serves_again(served_folder: Path, alone: Callable[..., str]) -> None:
    """Two rows and two that wait."""
    with run(served_folder) as running, ThreadPoolExecutor(4) as pool:
        running.gate.open.clear()
        answers = [pool.submit(running.ask) for _ in range(4)]
        wait(lambda: running.scheduler._open == 4)
        message = "2 requests run and 2 wait, which is all that this server takes; try again later"
        assert error(running.ask()) == (429, "queue_full", message)
        with pytest.raises(openai.RateLimitError):
            running.client().completions.create(model=NAME, prompt="x", stream=True)
        running.gate.open.set()
        texts = [answer.result()[1]["choices"][0]["text"] for answer in answers]
        assert texts == [alone("hello ", 8, Sampling())] * 4
        assert running.ask()[0] == 200
        samples = running.samples()
        assert samples["trihybrid_requests_total /v1/completions 429"] == 2
        assert samples["trihybrid_request_seconds_count"] == 5


def stream(running: Running, **fields: Any) -> socket.socket:
    """A connection on which a stream was asked for."""
    connection = socket.create_connection(("127.0.0.1", running.port), PATIENCE)
    body = json.dumps(request(stream=True, **fields)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    return connection


def events(connection: socket.socket) -> list[str]:
    """All events of an answer."""
    with closing(connection), connection.makefile("rb") as answer:
        return [line[6:].strip().decode() for line in answer if line.startswith(b"data: ")]


def test_a_client_that_leaves_frees_its_row(served_folder: Path, alone: Callable[..., str]) -> None:
    """In the middle of a stream, before the first token, and in the queue; the other is not disturbed."""
    with run(served_folder, rows=1, queue=8) as running:
        connection = stream(running, max_tokens=400)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()
        running.until("trihybrid_ended_total cancelled", 1)
        assert running.gate.free_rows == 1

        running.gate.open.clear()
        first, second = stream(running), stream(running)
        wait(lambda: running.scheduler._open == 2)
        third = running.connect()
        third.request("POST", "/v1/completions", json.dumps(request()).encode(), JSON)
        wait(lambda: running.scheduler._open == 3)
        first.close()
        third.close()
        wait(lambda: running.samples().get("trihybrid_requests_total /v1/completions 499") == 2)
        running.gate.open.set()
        parts = [json.loads(event) for event in events(second) if event != "[DONE]"]
        assert "".join(part["choices"][0]["text"] for part in parts) == alone("hello ", 8, Sampling())
        samples = running.samples()
        assert samples["trihybrid_ended_total cancelled"] == 3
        assert samples["trihybrid_running"] == samples["trihybrid_waiting"] == running.scheduler._open == 0


def test_time_runs_out_in_the_queue_and_on_the_way(served_folder: Path) -> None:
    with run(served_folder, rows=2, queue=2, seconds=7) as running, ThreadPoolExecutor(4) as pool:
        live = stream(running, max_tokens=400)
        assert live.recv(4096).startswith(b"HTTP/1.1 200")
        whole = pool.submit(running.ask, max_tokens=400)
        running.until("trihybrid_running", 2)
        waiting = pool.submit(running.ask)
        running.until("trihybrid_waiting", 1)
        running.gate.open.clear()
        running.clock.now = 7.0
        running.gate.open.set()
        status, code, message = error(whole.result())
        assert (status, code) == (408, "request_timeout")
        assert message.endswith("tokens after 7 seconds, all that a request has; ask for fewer")
        assert error(waiting.result()) == (
            429,
            "queue_timeout",
            "no row became free within 7 seconds; try again later",
        )
        *_, last = events(live)
        assert json.loads(last)["error"]["code"] == "request_timeout"
        assert running.samples()["trihybrid_ended_total timeout"] == 3
        assert running.gate.free_rows == 2 and running.ask()[0] == 200


def test_a_broken_engine_is_told_and_nothing_hangs(
    served_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with run(served_folder, rows=1) as running, ThreadPoolExecutor(2) as pool:
        running.gate.open.clear()
        answers = [pool.submit(running.ask) for _ in range(2)]
        wait(lambda: running.scheduler._open == 2)
        running.gate.error = RuntimeError("out of memory")
        running.gate.open.set()
        wanted = (500, "engine_failed", "the engine failed (RuntimeError)")
        assert [error(answer.result()) for answer in answers] == [wanted] * 2
        assert error(running.ask()) == wanted
        assert running.send("GET", "/health") == (503, {"status": "engine_failed"})
        assert running.samples()["trihybrid_ended_total failed"] == 2
    assert "out of memory" in caplog.text


def test_what_memory_cannot_hold_is_told_and_others_are_served(
    served_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 tokens have room from the start; with nothing free, no more can be had, though kept states leave."""
    with run(served_folder, rows=1, context=2000) as running:
        assert running.ask(prompt="x" * 100)[0] == 200
        monkeypatch.setattr(states, "free_bytes", lambda device: 0)
        status, code, message = error(running.ask(prompt="x" * 600))
        assert (status, code) == (503, "out_of_memory")
        assert "more tokens of keys and values needs 0.00 GiB of cpu, where 0.00 GiB are free" in message
        assert running.samples()["trihybrid_prefix_states"] == 0
        assert running.ask()[0] == 200
