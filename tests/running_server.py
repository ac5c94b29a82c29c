"""A tiny student behind a real server on a loopback port, whose engine and clock a test can stop."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.chat import end_tokens
from trihybrid.infer.engine import Engine
from trihybrid.infer.server.limits import Limits
from trihybrid.infer.server.process import Server, bind
from trihybrid.infer.server.served import Served
from trihybrid.infer.server.start import assemble
from trihybrid.models.checkpoint import load_model

NAME = "tiny"
PATIENCE = 30


@dataclass
class Gate:
    """An engine whose steps wait while it is shut, and fail where a test says so. It shuts after so many steps."""

    engine: Engine
    open: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    shuts_after: int | None = None

    def step(self) -> list:
        assert self.open.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        if self.shuts_after is not None:
            self.shuts_after -= 1
            if self.shuts_after == 0:
                self.open.clear()
        return self.engine.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Clock:
    """Stands still but for a test that moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Running:
    """A server in this process."""

    def __init__(self, server: Server, gate: Gate, clock: Clock, port: int, key: str | None) -> None:
        self.server, self.gate, self.clock, self.port, self.key = server, gate, clock, port, key
        self.scheduler = server.scheduler

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's client, which tries once."""
        fields = {"api_key": self.key or "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **fields)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def send(
        self, method: str, path: str, body: bytes | dict | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and JSON, or text, of an answer."""
        fields = {"Content-Type": "application/json"} if body is not None else {}
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        with closing(self.connect()) as connection:
            connection.request(method, path, content, fields | headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = answer.headers["content-type"] == "application/json"
            return answer.status, json.loads(text) if is_json else text

    def ask(self, **fields: Any) -> tuple[int, Any]:
        """The answer of /v1/completions."""
        return self.send("POST", "/v1/completions", request(**fields))

    def samples(self) -> dict[str, float]:
        """Name and labels -> value of all metrics."""
        text = self.send("GET", "/metrics")[1]
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def until(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        wait(lambda: self.samples().get(name) == value)


def request(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": "hello ", "max_tokens": 8, "temperature": 0} | fields


def wait(condition: Callable[[], bool]) -> None:
    """Until something is so; a bound keeps a failure from hanging."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@contextmanager
def run(folder: Path, *, key: str | None = None, grace: float = PATIENCE, **limits: Any) -> Iterator[Running]:
    """A server whose clock stands still."""
    bounds = Limits(**({"rows": 2, "queue": 2, "context": 512, "seconds": 60} | limits))
    model, tokenizer = load_model(folder), Tokenizer.from_file(folder)
    gate = Gate(Engine(model, rows=bounds.rows, chunk=16))
    gate.open.set()
    ends = frozenset(end_tokens(model, tokenizer))
    served = Served(folder, tokenizer, gate.engine.vocabulary, ends, NAME, bounds)
    clock = Clock()
    with (
        bind("127.0.0.1", 0) as listening,
        assemble(gate, served, key, grace, clock) as server,  # type: ignore[arg-type]
    ):
        running = Running(server, gate, clock, listening.getsockname()[1], key)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait(lambda: server.started)
        try:
            yield running
        finally:
            gate.open.set()
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()
