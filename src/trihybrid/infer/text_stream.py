"""Text of a sequence as it grows: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence

from trihybrid.data.tokens import TextTokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CHARACTER = 4
"""A character has at most so many bytes, and a token at least one."""


class TextStream:
    """Turns the tokens of one continuation into pieces of text, which together are the text up to the first stop
    string: the one that is complete first.

    Args:
        tokenizer: the model's.
        stops: strings that end the text; they are not part of it, wherever the borders of tokens lie. None is empty.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; leave it away")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # Tokens whose text is out, which the decoder may need before it, and behind them those that are not whole yet.
        self._tokens: list[int] = []
        self._out = 0
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; nothing more will come."""
        return self._stopped

    def push(self, token: int) -> str:
        """What can be shown after one more token; "" while a character or a possible stop string is incomplete."""
        if self._stopped:
            return ""
        self._tokens.append(token)
        if not self._tokenizer.decode(self._tokens).endswith(BROKEN):
            return self._let_go(self._settle(len(self._tokens)))
        if len(self._tokens) - self._out > CHARACTER:
            # No character takes so many tokens: the oldest is not the beginning of one.
            return self._let_go(self._settle(self._out + 1))
        return ""

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self._stopped:
            return ""
        shown = self._let_go(self._settle(len(self._tokens)))
        rest = "" if self._stopped else self._held
        self._held = ""
        return shown + rest

    def _settle(self, end: int) -> str:
        """The text of the tokens up to `end` that is not out yet; it then is."""
        before = self._tokenizer.decode(self._tokens[: self._out])
        text = self._tokenizer.decode(self._tokens[:end])[len(before) :]
        self._tokens, self._out = self._tokens[self._out :], end - self._out
        return text

    def _let_go(self, text: str) -> str:
        """All that was held and `text`, up to a stop string or what may become one."""
        text = self._held + text
        met = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops if stop in text]
        if met:
            self._held, self._stopped = "", True
            return text[: min(met)[1]]
        keep = max((_beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`, at most."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
