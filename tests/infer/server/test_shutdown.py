"""At SIGTERM what waits is refused, what runs finishes within its grace, and nobody is left without an answer."""

import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from running_server import PATIENCE, Running, run, wait
from trihybrid.infer.sampling import Sampling


def end(running: Running) -> None:
    """What the signal calls."""
    running.server.handle_exit(signal.SIGTERM, None)
    wait(lambda: running.scheduler.closed is not None)


def test_what_runs_finishes_and_what_waits_is_refused(served_folder: Path, alone: Callable[..., str]) -> None:
    with (
        run(served_folder, rows=1, queue=4) as running,
        ThreadPoolExecutor(2) as pool,
        closing(running.connect()) as late,
    ):
        late.request("GET", "/health")
        assert late.getresponse().read()
        running.gate.open.clear()
        runs = pool.submit(running.ask)
        wait(lambda: running.scheduler._open == 1)
        waits = pool.submit(running.ask)
        wait(lambda: running.scheduler._open == 2)
        end(running)
        running.gate.open.set()
        status, body = waits.result(PATIENCE)
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        status, body = runs.result(PATIENCE)
        assert (status, body["choices"][0]["text"]) == (200, alone("hello ", 8, Sampling()))
        wait(lambda: not running.server.server_state.connections)


def test_what_is_too_long_is_ended_with_an_error(served_folder: Path) -> None:
    """The clock passes the grace while the engine is in a step."""
    with run(served_folder, grace=9, rows=1) as running, closing(running.connect()) as connection:
        running.gate.shuts_after = 40
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True, "temperature": 0}
        connection.request(
            "POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: ")
        end(running)
        running.clock.now = 9.0
        running.gate.open.set()
        lines = [line for line in answer.read().decode().splitlines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert running.gate.free_rows == 1
