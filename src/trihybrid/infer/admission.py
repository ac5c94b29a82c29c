"""What may join an engine: tokens that its model knows, a prefix that they begin with, marks between the two."""

import logging
from collections.abc import Collection, Mapping, Sequence

from trihybrid.infer.sequence import Snapshot

logger = logging.getLogger(__name__)


class Admission:
    """The checks of `Engine.add`.

    Args:
        vocabulary: how many tokens the model knows.
        media: id -> name of tokens that are no text.
        positions: as far as the model was made for; None where nothing says.
    """

    def __init__(self, vocabulary: int, media: Mapping[int, str], positions: int | None) -> None:
        self._vocabulary, self._media, self._positions = vocabulary, media, positions

    def check(
        self, tokens: Sequence[int], most: int, prefix: Snapshot | None, marks: Collection[int]
    ) -> None:
        """ValueError unless a sequence of these may join; see `Engine.add`. Tokens beyond the model's positions are
        told in the log, once."""
        if not len(tokens):
            raise ValueError("tokens is empty; a sequence begins with at least one, as the tokenizer's BOS")
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise ValueError(
                f"tokens span {min(tokens)} to {max(tokens)}; the vocabulary is 0 to {self._vocabulary - 1}"
            )
        media = next((token for token in tokens if token in self._media), None)
        if media is not None:
            raise ValueError(
                f"tokens hold {media}, the {self._media[media]}: this is the text model alone, which has no "
                "images, sound or video; leave them out of the prompt"
            )
        if most < 1:
            raise ValueError(f"most is {most}; it must be at least 1")
        seen = 0 if prefix is None else len(prefix.tokens)
        if prefix is not None and (len(tokens) <= seen or tuple(tokens[:seen]) != prefix.tokens):
            raise ValueError(
                f"prefix has seen {seen} tokens; a sequence that goes on from it begins with them and has one more"
            )
        if marks and not seen < min(marks) <= max(marks) < len(tokens):
            raise ValueError(
                f"marks span {min(marks)} to {max(marks)}; they lie in {seen + 1} to {len(tokens) - 1}"
            )
        if self._positions is not None and len(tokens) + most - 1 > self._positions:
            logger.warning(
                "a sequence of up to %s tokens: the model's max_position_embeddings is %s, and nobody knows what it "
                "writes beyond (said once)",
                f"{len(tokens) + most - 1:,}",
                f"{self._positions:,}",
            )
            self._positions = None
