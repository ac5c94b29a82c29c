"""A server from a model folder."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from trihybrid.infer.engine import Engine
from trihybrid.infer.server.app import make_app
from trihybrid.infer.server.limits import Limits
from trihybrid.infer.server.metrics import Metrics
from trihybrid.infer.server.process import Server
from trihybrid.infer.server.scheduler import Scheduler
from trihybrid.infer.server.served import Served
from trihybrid.models.checkpoint import load_model


@contextmanager
def open_server(
    folder: str | Path,
    name: str,
    limits: Limits,
    key: str | None = None,
    grace: float = 30,
    chunk: int = 512,
    device: str = "cpu",
) -> Iterator[Server]:
    """A server that can be run; its threads end with the context.

    Args:
        folder: of a teacher or student with its tokenizer.
        name: by which requests call it.
        limits: of requests.
        key: what clients must send; None lets everybody.
        grace: seconds that running requests have when it ends.
        chunk: as of `Engine`.
        device: of the model.

    Raises:
        ValueError: a folder, device or number that cannot be.
    """
    try:
        model = load_model(folder).to(device)
    except RuntimeError as error:
        raise ValueError(f"device {device}: {error}") from None
    engine = Engine(model, rows=limits.rows, chunk=chunk)
    metrics = Metrics()
    with (
        closing(Served(folder, model, engine.vocabulary, name, limits)) as served,
        Scheduler(engine, served.tokenizer, limits, metrics) as scheduler,
    ):
        yield Server(make_app(served, scheduler, limits, metrics, key), scheduler, grace)
