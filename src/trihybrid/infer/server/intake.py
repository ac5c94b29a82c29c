"""The body of a request, within its bounds."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from trihybrid.infer.server.limits import Limits, Refusal

Result = TypeVar("Result")


async def read_body(request: Request, limits: Limits) -> bytes:
    """All of it.

    Raises:
        ClientDisconnect: the client left.
        Refusal: it is not said to be JSON, or larger or slower than the limits.
    """
    # A page of another site may send forms and plain text to a loopback address, but not this type.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(
            415, "unsupported_media_type", 'the body must be JSON: send "Content-Type: application/json"'
        )
    try:
        async with asyncio.timeout(limits.seconds):
            return await _gather(request, limits.body_bytes)
    except TimeoutError:
        raise Refusal(
            408, "request_timeout", f"the body took longer than {limits.seconds:g} seconds"
        ) from None


async def _gather(request: Request, most: int) -> bytes:
    """What is too much is read and dropped, since a client that still sends would not see the answer."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
    if size > most:
        raise Refusal(413, "body_too_large", f"the body has {size:,} bytes; this server reads {most:,}")
    return b"".join(parts)


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives, whose request's body was read.

    Raises:
        ClientDisconnect: the client left first; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
