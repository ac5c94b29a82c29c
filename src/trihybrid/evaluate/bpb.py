"""Bits per byte: what a model needs to write one byte of the text, whatever its tokenizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from trihybrid.data import Batch
from trihybrid.evaluate.scoring import Scores, score


@dataclass(frozen=True)
class BitsPerByte:
    """decoded, raw: bits a byte of the decoded tokens and of the original text; nats: their sum; tokens: how many."""

    decoded: float
    raw: float
    nats: float
    tokens: int


class BitsPerByteMeter:
    """Sums -log p(target) in float64; bits per byte = nats / ln 2 / bytes.

    decoded_bytes: UTF-8 bytes of the scored tokens decoded. raw_bytes: of the text that they came from, which is
    more where a tokenizer loses something. Both are counted on the text itself, never on a table of token lengths.
    ValueError when one is below 1.
    """

    def __init__(self, decoded_bytes: int, raw_bytes: int) -> None:
        for name, count in (("decoded_bytes", decoded_bytes), ("raw_bytes", raw_bytes)):
            if count < 1:
                raise ValueError(f"{name} is {count}; bits per byte need a text of at least 1 byte")
        self.decoded_bytes = decoded_bytes
        self.raw_bytes = raw_bytes
        self.nats = 0.0
        self.tokens = 0

    def add(self, scores: Scores) -> None:
        """Add the nats of one chunk."""
        self.nats += scores.nats_N.double().sum().item()
        self.tokens += len(scores.nats_N)

    def result(self) -> BitsPerByte:
        """Return the bits per byte of everything added."""
        bits = self.nats / math.log(2)
        return BitsPerByte(bits / self.decoded_bytes, bits / self.raw_bytes, self.nats, self.tokens)


def bits_per_byte(
    model: nn.Module, batches: Iterable[Batch], decoded_bytes: int, raw_bytes: int
) -> BitsPerByte:
    """Bits per byte of a causal language model over batches; see `BitsPerByteMeter` for the two byte counts.

    The first token of a document (BOS) is never predicted and has no bytes. ValueError when no target counts.
    """
    meter = BitsPerByteMeter(decoded_bytes, raw_bytes)
    score(model, batches, [meter])
    return meter.result()
