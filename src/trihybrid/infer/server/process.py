"""The server's process: sockets, signals, and an end that finishes what it can."""

import logging
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from trihybrid.infer.server.scheduler import Scheduler

logger = logging.getLogger(__name__)
MARGIN = 5
"""Seconds that connections have beyond the grace of requests, for answers that are on their way."""


class Server(uvicorn.Server):
    """uvicorn, whose end is the scheduler's too.

    At SIGTERM or SIGINT nothing is accepted any more, what waits is refused, what runs has `grace` seconds, and `run`
    returns. A second signal ends it at once.

    Args:
        app: the application.
        scheduler: which it submits to.
        grace: seconds.

    Attributes:
        scheduler: as given.
    """

    should_exit: bool
    force_exit: bool

    def __init__(self, app: Starlette, scheduler: Scheduler, grace: float) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http="h11",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace) + MARGIN,
        )
        super().__init__(config)
        self.scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again when all is done, and the process would not end with exit code 0."""
        logger.info("%s: shutting down", signal.Signals(sig).name)
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Of uvicorn, which waits for the connections."""
        self.scheduler.drain(self._grace)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ValueError: an address that this machine does not have, or a port that is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in ("localhost", "::1") or host.startswith("127.")
