"""What a server counts, in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counters of one server; nothing is shared between servers of a process.

    Attributes:
        requests: answers by endpoint and HTTP status; 499 is a client that left before its answer.
        ended: requests that waited or ran, by how they ended: `stop`, `length`, `cancelled`, `timeout`, `shutdown`,
            `refused` (by the engine) or `failed`.
        prompt_tokens: of requests whose first token was chosen.
        chosen_tokens: of answers.
        prefix_hits: requests that went on from a kept state.
        prefix_tokens: of their prompts, those that were not read again.
        prefix_evicted: kept states that left for want of room.
        prefix_states, prefix_bytes: kept states, and what they hold.
        running, waiting: requests in the engine and in the queue.
        first_token: seconds from arrival to the first token.
        whole: seconds from arrival to the end, however it ended.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "trihybrid_requests", "Answers", ("endpoint", "status"), registry=self._registry
        )
        self.ended = Counter("trihybrid_ended", "Requests by their end", ("end",), registry=self._registry)
        self.prompt_tokens = Counter("trihybrid_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.chosen_tokens = Counter("trihybrid_chosen_tokens", "Tokens of answers", registry=self._registry)
        self.prefix_hits = Counter(
            "trihybrid_prefix_hits", "Requests from a kept state", registry=self._registry
        )
        self.prefix_tokens = Counter(
            "trihybrid_prefix_tokens", "Tokens of prompts not read again", registry=self._registry
        )
        self.prefix_evicted = Counter(
            "trihybrid_prefix_evicted", "Kept states that had to leave", registry=self._registry
        )
        self.prefix_states = Gauge("trihybrid_prefix_states", "Kept states", registry=self._registry)
        self.prefix_bytes = Gauge("trihybrid_prefix_bytes", "Bytes of kept states", registry=self._registry)
        self.running = Gauge("trihybrid_running", "Requests in the engine", registry=self._registry)
        self.waiting = Gauge("trihybrid_waiting", "Requests in the queue", registry=self._registry)
        self.first_token = Histogram(
            "trihybrid_first_token_seconds",
            "From arrival to the first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.whole = Histogram(
            "trihybrid_request_seconds",
            "From arrival to the end",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
