"""An answer as server-sent events, piece by piece."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from trihybrid.infer.server.answers import TextAnswer, usage
from trihybrid.infer.server.limits import Refusal
from trihybrid.infer.server.scheduler import Piece, Ticket

logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """The rest of an answer whose first piece is there.

    An error behind it is an event of its own, the last one, and no `[DONE]` follows it. However the response ends, the
    ticket is cancelled.

    Args:
        ticket: where the pieces come from.
        first: the first of them.
        answer: how they look.
        with_usage: whether the usage goes behind them.
        seconds: a client that has not read everything by then is cut off.
    """

    def __init__(
        self, ticket: Ticket, first: Piece, answer: TextAnswer, with_usage: bool, seconds: float
    ) -> None:
        super().__init__(
            _events(ticket, first, answer, with_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._ticket, self._seconds = ticket, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning(
                "a client did not read its answer within %g seconds and was cut off", self._seconds
            )
        finally:
            self._ticket.cancel()


async def _events(ticket: Ticket, first: Piece, answer: TextAnswer, with_usage: bool) -> AsyncIterator[str]:
    for chunk in answer.opening():
        yield event(chunk)
    piece = first
    yield event(answer.piece(piece.text, piece.finish))
    while piece.finish is None:
        try:
            piece = await ticket.next()
        except Refusal as refusal:
            yield event(refusal.body())
            return
        yield event(answer.piece(piece.text, piece.finish))
    if with_usage:
        yield event(answer.closing(usage(len(ticket.work.tokens), piece.chosen, ticket.cached)))
    yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
