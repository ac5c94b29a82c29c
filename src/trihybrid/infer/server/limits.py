"""What requests may ask of a server, and how one that asks too much is told."""

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Bounds of a server; README and docs/serving.md give the options that set them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int = Field(default=8, ge=1, le=4096, description="requests that are worked on together")
    queue: int = Field(default=64, ge=0, le=100_000, description="requests that may wait for a row")
    context: int = Field(default=8192, ge=2, description="tokens of a prompt and its answer together")
    new_tokens: int = Field(default=1024, ge=1, description="longest answer where a request does not say")
    seconds: float = Field(default=600, gt=0, description="time from a request's arrival to its last token")
    prefix_mib: float = Field(
        default=1024,
        ge=0,
        le=2**30,
        description="MiB of states kept for prompts that begin alike; 0 keeps none",
    )

    @property
    def body_bytes(self) -> int:
        """Most bytes of a request's body: 64 KiB, and 32 for each token of the context."""
        return 65_536 + 32 * self.context


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        code: one word for programs.
        message: what is wrong, what is allowed and what to do.
        param: the field of the request that is wrong, None where it is none of them.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it: when to come back, how to log in, or that asking again costs the same time again."""
        return {
            401: {"WWW-Authenticate": "Bearer"},
            408: {"x-should-retry": "false"},
            429: {"Retry-After": "1"},
            503: {"Retry-After": "5"},
        }.get(self.status, {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The form in which OpenAI's clients read errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
