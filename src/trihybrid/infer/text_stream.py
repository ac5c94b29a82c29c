"""Text of a sequence as it grows: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence

from trihybrid.data.tokens import TextTokenizer


class TextStream:
    """Turns the tokens of one continuation into pieces of text, which together are the text up to the first stop string.

    Args:
        tokenizer: the model's.
        stops: strings that end the text; they are not part of it, wherever the borders of tokens lie. None is empty.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str] = ()) -> None:
        raise NotImplementedError

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; nothing more will come."""
        raise NotImplementedError

    def push(self, token: int) -> str:
        """What can be shown after one more token; "" while a character or a possible stop string is incomplete."""
        raise NotImplementedError

    def finish(self) -> str:
        """What was held back, when no token follows."""
        raise NotImplementedError
