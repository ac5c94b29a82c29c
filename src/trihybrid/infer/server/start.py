"""A server from a model folder."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.chat import end_tokens
from trihybrid.infer.engine import Engine, Execution
from trihybrid.infer.server.app import make_app
from trihybrid.infer.server.limits import Limits
from trihybrid.infer.server.metrics import Metrics
from trihybrid.infer.server.process import Server
from trihybrid.infer.server.scheduler import Scheduler
from trihybrid.infer.server.served import Served
from trihybrid.infer.weights import Weights
from trihybrid.models.checkpoint import load_model
from trihybrid.models.device import present_device


@contextmanager
def open_server(
    folder: str | Path,
    name: str,
    limits: Limits,
    key: str | None = None,
    grace: float = 30,
    chunk: int = 512,
    device: str = "cpu",
    execution: Execution = "eager",
    weights: Weights = "full",
) -> Iterator[Server]:
    """A server that can be run; its threads end with the context.

    Args:
        folder: of a teacher or student with its tokenizer.
        name: by which requests call it.
        limits: of requests.
        key: what clients must send; None lets everybody.
        grace: seconds that running requests have when it ends.
        chunk, execution, weights: as of `Engine`.
        device: of the model.

    Raises:
        ValueError: a folder, device or number that cannot be.
    """
    place = present_device(device)
    tokenizer, model = Tokenizer.from_file(folder), load_model(folder).to(place)
    ends = frozenset(end_tokens(model, tokenizer))
    engine = Engine(model, rows=limits.rows, chunk=chunk, execution=execution, weights=weights)
    with assemble(
        engine, Served(folder, tokenizer, engine.vocabulary, ends, name, limits), key, grace
    ) as server:
        yield server


@contextmanager
def assemble(
    engine: Engine,
    served: Served,
    key: str | None = None,
    grace: float = 30,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Server]:
    """A server over an engine with `served.limits.rows` rows; see `open_server` and `Scheduler`."""
    metrics = Metrics()
    with (
        closing(served),
        Scheduler(engine, served.tokenizer, served.limits, metrics, clock) as scheduler,
    ):
        yield Server(make_app(served, scheduler, metrics, key), scheduler, grace)
