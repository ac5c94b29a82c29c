"""Continuous batching: requests join the engine as rows become free and leave as they end, on a thread of their own.

The event loop submits and cancels, the thread does everything else; between them go a queue of commands and, back, one
queue of pieces a request. Requests are admitted in the order of their arrival.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.engine import Engine, EngineFull, Finish, Snapshot
from trihybrid.infer.prefixes import Prefixes
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.server.limits import Limits, Refusal
from trihybrid.infer.server.metrics import Metrics
from trihybrid.infer.text_stream import TextStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What a request asks of the engine.

    Attributes:
        tokens: the prompt.
        most: new tokens at most.
        sampling: how they are chosen.
        ends: tokens that end the answer.
        stops: strings that end it.
    """

    tokens: list[int]
    most: int
    sampling: Sampling
    ends: frozenset[int]
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: its text, how many tokens were chosen up to here, and why the answer ends, if it does."""

    text: str
    chosen: int
    finish: Finish | None


class Ticket:
    """A request that waits or runs, as the event loop sees it."""

    def __init__(self, scheduler: "Scheduler", work: Work, stream: TextStream, arrival: float) -> None:
        self.work, self.stream, self.arrival = work, stream, arrival
        # Tokens: of the answer so far, and of the prompt those that a kept state had seen.
        self.chosen = self.cached = 0
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Refusal] = asyncio.Queue()

    async def next(self) -> Piece:
        """The next piece; none follows one with a `finish`.

        Raises:
            Refusal: the request was ended by a limit, a failure or the end of the server.
        """
        piece = await self._pieces.get()
        if isinstance(piece, Refusal):
            raise piece
        return piece

    def cancel(self) -> None:
        """Nobody wants the rest; nothing happens where there is none."""
        self._scheduler.cancel(self)

    def deliver(self, piece: Piece | Refusal) -> None:
        """For the scheduler's thread. A loop that is closed has no reader."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Scheduler:
    """Shares an engine among requests.

    Args:
        engine: with `limits.rows` rows, idle; only the scheduler's thread calls it from now on.
        tokenizer: the model's.
        limits: rows, queue, seconds and the memory for prefixes are this class's.
        metrics: where it counts.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._limits, self._metrics, self._clock = limits, metrics, clock
        self._prefixes = Prefixes(engine, int(limits.prefix_mib * 2**20))
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        # Under the lock: requests between `submit` and their end, and why there can be no more of them.
        self._open = 0
        self._closed: Refusal | None = None
        self._grace: float | None = None
        self._broken = self._over = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Scheduler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End everything at once and wait for the thread."""
        self.drain(0)
        self._commands.put(self._finish_up)
        self._thread.join()

    @property
    def closed(self) -> Refusal | None:
        """Why no request is taken any more: the server ends or the engine failed. None while all is well."""
        return self._closed

    def submit(self, work: Work) -> Ticket:
        """Take a request; called on the event loop.

        Raises:
            Refusal: the queue is full, or none is taken any more.
        """
        ticket = Ticket(self, work, TextStream(self._tokenizer, work.stops), self._clock())
        room = self._limits.rows + self._limits.queue
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if self._open >= room:
                raise Refusal(
                    429,
                    "queue_full",
                    f"{self._limits.rows} requests run and {self._limits.queue} wait, which is all that this server "
                    "takes; try again later",
                )
            self._open += 1
            self._commands.put(partial(self._waiting.append, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Let a request go, if it is still there."""
        self._commands.put(partial(self._end, ticket, "cancelled", None))

    def drain(self, grace: float) -> None:
        """Take no more requests, refuse those that wait, and give those that run `grace` seconds to finish."""
        self._close(Refusal(503, "shutting_down", "the server is shutting down; try again later"))
        self._commands.put(partial(self._begin_drain, self._clock() + grace))

    def _close(self, reason: Refusal) -> None:
        with self._lock:
            self._closed = self._closed or reason

    # What follows runs on the thread.

    def _run(self) -> None:
        try:
            while not self._over:
                self._obey()
                self._expire()
                self._admit()
                if self._engine.busy:
                    self._advance()
        except Exception as error:
            logger.exception("the engine failed; the server refuses requests from now on")
            self._broken = True
            self._close(Refusal(500, "engine_failed", f"the engine failed ({type(error).__name__})"))
            self._end_all("failed")
            while not self._over:
                self._commands.get()()
                self._end_all("failed")

    def _obey(self) -> None:
        """Do what was asked for; sleep until something is where there is nothing else to do."""
        if not self._waiting and not self._running:
            self._commands.get()()
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _expire(self) -> None:
        """End what has run out of time."""
        now, seconds = self._clock(), self._limits.seconds
        for ticket in [*self._waiting, *self._running.values()]:
            if now - ticket.arrival >= seconds:
                if ticket in self._waiting:
                    message = f"no row became free within {seconds:g} seconds; try again later"
                    self._end(ticket, "timeout", Refusal(429, "queue_timeout", message))
                else:
                    message = f"the answer had {ticket.chosen} tokens after {seconds:g} seconds, all that a request has"
                    self._end(ticket, "timeout", Refusal(408, "request_timeout", f"{message}; ask for fewer"))
        if self._grace is not None and now >= self._grace:
            self._end_all("shutdown")

    def _admit(self) -> None:
        """Let those who wait join the engine, first come, first served."""
        while self._waiting and self._engine.free_rows:
            ticket, work = self._waiting[0], self._waiting[0].work
            prefix = self._prefixes.longest(work.tokens)
            seen = 0 if prefix is None else len(prefix.tokens)
            try:
                number = self._engine.add(
                    work.tokens,
                    most=work.most,
                    sampling=work.sampling,
                    stops=work.ends,
                    prefix=prefix,
                    marks=self._prefixes.marks(work.tokens, seen),
                )
            except EngineFull as error:
                if self._prefixes.evict():
                    self._metrics.prefix_evicted.inc()
                    continue
                if self._running:
                    break
                self._end(ticket, "refused", Refusal(503, "out_of_memory", str(error)))
                continue
            except ValueError as error:
                self._end(ticket, "refused", Refusal(400, "invalid_value", str(error)))
                continue
            self._running[number] = self._waiting.popleft()
            ticket.cached = seen
            self._metrics.prefix_hits.inc(seen > 0)
            self._metrics.prefix_tokens.inc(seen)
        self._count()

    def _advance(self) -> None:
        tokens = self._engine.step()
        for number, ticket in self._running.items():
            if ticket.chosen == 0:
                for snapshot in self._engine.collect(number):
                    self._keep(snapshot)
        for token in tokens:
            ticket = self._running[token.sequence]
            if ticket.chosen == 0:
                self._metrics.first_token.observe(self._clock() - ticket.arrival)
                self._metrics.prompt_tokens.inc(len(ticket.work.tokens))
            ticket.chosen += 1
            self._metrics.chosen_tokens.inc()
            text = "" if token.id in ticket.work.ends else ticket.stream.push(token.id)
            if token.finish is not None:
                text += ticket.stream.finish()
            finish = "stop" if ticket.stream.stopped else token.finish
            if finish is not None:
                self._keep_answer(token.sequence, ticket)
                self._end(ticket, finish, Piece(text, ticket.chosen, finish))
            elif text:
                ticket.deliver(Piece(text, ticket.chosen, None))

    def _keep(self, snapshot: Snapshot) -> None:
        self._metrics.prefix_evicted.inc(self._prefixes.keep(snapshot))

    def _keep_answer(self, number: int, ticket: Ticket) -> None:
        """Keep the state behind an answer, for the next turn of a conversation."""
        if self._prefixes.fits(len(ticket.work.tokens) + ticket.chosen):
            # Without a page for its end it is left away.
            with contextlib.suppress(EngineFull):
                self._keep(self._engine.snapshot(number))

    def _end(self, ticket: Ticket, end: str, last: Piece | Refusal | None) -> None:
        """Let a request leave, count it, then tell it; nothing for one that has left."""
        number = next((number for number, one in self._running.items() if one is ticket), None)
        if number is not None:
            del self._running[number]
            if not self._broken:
                self._engine.remove(number)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        else:
            return
        with self._lock:
            self._open -= 1
        self._metrics.ended.labels(end).inc()
        self._metrics.whole.observe(self._clock() - ticket.arrival)
        self._count()
        if last is not None:
            ticket.deliver(last)

    def _end_all(self, end: str) -> None:
        for ticket in [*self._waiting, *self._running.values()]:
            self._end(ticket, end, self._closed)

    def _begin_drain(self, until: float) -> None:
        self._grace = until if self._grace is None else min(until, self._grace)
        for ticket in list(self._waiting):
            self._end(ticket, "shutdown", self._closed)

    def _finish_up(self) -> None:
        self._end_all("shutdown")
        self._over = True

    def _count(self) -> None:
        self._metrics.running.set(len(self._running))
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.prefix_states.set(len(self._prefixes))
        self._metrics.prefix_bytes.set(self._prefixes.bytes)
