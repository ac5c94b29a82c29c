"""Bytes that a token stands for, given the token before it: the denominator of bits per byte.

    bytes(t | p) = base[t] + (lead[t] and not border[p])

`base` counts the bytes of a token without the space that SentencePiece writes as a mark at its head; `lead` says
that there is such a mark; after a `border` (a control token such as BOS) the decoder drops that space. This is
the count of the parameter-golf challenge. A table can be wrong without any number looking wrong, so
`check_table` holds it against the decoded text, document by document.

Shape letters: N tokens, V vocabulary.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from .shards import TokenShards
from .tokens import TextTokenizer


@dataclass(frozen=True, eq=False)
class ByteTable:
    """The three columns of the table.

    base_V: int64, bytes of each token without a leading space, 0 for control, unknown and unused tokens.
    lead_V: bool, whether a space comes before the token.
    border_V: bool, whether the token swallows the leading space of the next one.
    """

    base_V: np.ndarray
    lead_V: np.ndarray
    border_V: np.ndarray

    def lengths(self, targets_N: np.ndarray, previous_N: np.ndarray) -> np.ndarray:
        """Bytes of each target after its predecessor, int64 [N].

        Args:
            targets_N, previous_N: integers of equal shape, ids in 0..V - 1.

        Raises:
            ValueError: for other shapes, or an id outside the table.
        """
        targets_N, previous_N = np.asarray(targets_N), np.asarray(previous_N)
        if targets_N.shape != previous_N.shape:
            raise ValueError(f"{targets_N.shape} targets and {previous_N.shape} predecessors: must be equal")
        for ids in (targets_N, previous_N):
            if ids.size and (ids.min() < 0 or ids.max() >= self.base_V.size):
                raise ValueError(
                    f"ids span {ids.min()} to {ids.max()}, the byte table 0 to {self.base_V.size - 1}"
                )
        return self.base_V[targets_N] + (self.lead_V[targets_N] & ~self.border_V[previous_N])

    def count(self, targets_N: np.ndarray, previous_N: np.ndarray) -> int:
        """Bytes of all targets together; see `lengths`."""
        return int(self.lengths(targets_N, previous_N).sum())


def byte_lengths(tokenizer: TextTokenizer) -> ByteTable:
    """The byte table of a tokenizer.

    Raises:
        ValueError: for a tokenizer whose tokens have no fixed bytes.
    """
    return ByteTable(*tokenizer.byte_rules())


def check_table(
    shards: TokenShards, tokenizer: TextTokenizer, table: ByteTable | None = None, limit: int | None = None
) -> int:
    """Compare the table's count with the UTF-8 length of the decoded text, for every document.

    Args:
        shards: the documents.
        tokenizer: what made them.
        table: the table to check; None: the tokenizer's own.
        limit: check only the first `limit` documents, >= 1; None: all.

    Returns:
        Bytes of the documents that were checked.

    Raises:
        ValueError: for shards of another tokenizer, or a document (named by its number, from 0) whose two
            counts differ.
    """
    if shards.manifest.tokenizer_hash != tokenizer.hash:
        raise ValueError(
            f"{shards.folder} was made with tokenizer {shards.manifest.tokenizer_hash}, given is "
            f"{tokenizer.hash}: name the right tokenizer, or prepare the data again"
        )
    table = byte_lengths(tokenizer) if table is None else table
    total = 0
    for number, document in enumerate(islice(shards.documents(), limit)):
        counted = table.count(document[1:], document[:-1])
        decoded = len(tokenizer.decode(document).encode())
        if counted != decoded:
            raise ValueError(
                f"{shards.folder}: document {number} decodes to {decoded} bytes, the byte table counts {counted}: "
                "bits per byte would be wrong with this tokenizer"
            )
        total += counted
    return total
