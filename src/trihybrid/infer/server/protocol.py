"""What clients send: OpenAI's fields that this server has, with top_k, min_p and repetition_penalty beside them.

A field of the wrong type and a field that is not here are refused: what a client asked for is never left out silently.
Null is the default. `user` is taken and means nothing here.
"""

import secrets
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trihybrid.infer.chat_prompt import Message
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.server.limits import Refusal

Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """Of a stream: whether its last event tells the usage."""

    include_usage: bool | None = None


class Generation(_Strict):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    user: str | None = None

    @property
    def most(self) -> int | None:
        """The longest answer that is wanted; None where the request does not say."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer.

        Raises:
            Refusal: an empty one.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(stops):
            raise Refusal(400, "invalid_value", "stop: a stop string is empty; leave it away", "stop")
        return stops

    def sampling(self) -> Sampling:
        """How tokens are chosen: temperature 1 where the request does not say, and a fresh seed.

        Raises:
            Refusal: a setting out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            return Sampling(**({"temperature": 1.0, "seed": secrets.randbits(63)} | given))
        except ValueError as error:
            raise Refusal(400, "invalid_value", str(error), str(error).split()[0]) from None


class CompletionRequest(Generation):
    """Of /v1/completions: a text, or token ids, which stand for themselves and get no BOS."""

    prompt: str | list[int]
    echo: Literal[False] | None = None
    logprobs: None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        """The turn as a chat template takes it."""
        parts = self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content)]
        return Message(role=self.role, content="".join(part.text for part in parts))


class ChatRequest(Generation):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None

    @property
    def most(self) -> int | None:
        """As OpenAI has it, `max_completion_tokens` is the newer name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Asked = TypeVar("Asked", bound=Generation)


def read(kind: type[Asked], body: bytes) -> Asked:
    """A request from its JSON.

    Raises:
        Refusal: no JSON, or a field that is missing, unknown or of the wrong type.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> Refusal:
    """The first field that is wrong. One that may have several types has an error for each of them."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return Refusal(400, "invalid_json", f"the body is not JSON: {errors[0]['msg']}")
    if not errors[0]["loc"]:
        return Refusal(400, "invalid_type", "the body is not a JSON object")
    same = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    place = list(errors[0]["loc"])
    while any(list(one["loc"][: len(place)]) != place for one in same):
        place.pop()
    field = ".".join(map(str, place))
    if errors[0]["type"] == "extra_forbidden":
        return Refusal(400, "unknown_field", f"{field}: this server has no such field; leave it away", field)
    messages = "; or ".join(dict.fromkeys(one["msg"] for one in same))
    return Refusal(400, "invalid_type", f"{field}: {messages}", field)
