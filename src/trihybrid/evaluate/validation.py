"""The piece of validation text that is scored, with its bytes counted on the text itself."""

from dataclasses import dataclass

import numpy as np

from trihybrid.data import PreparedData


@dataclass(frozen=True)
class ValidationPiece:
    """The head of the validation stream.

    tokens: how many from the first, one BOS a document included. documents: how many begin in it, the last one maybe
    cut. decoded_bytes: UTF-8 bytes of its tokens decoded. raw_bytes: UTF-8 bytes of the text that they stand for.
    """

    tokens: int
    documents: int
    decoded_bytes: int
    raw_bytes: int


def validation_piece(data: PreparedData, limit: int | None) -> ValidationPiece:
    """Take at most limit tokens of data.validation (None for all), ending between two characters of the text.

    Each document is decoded and measured, rather than its tokens looked up in a table of lengths, which a tokenizer
    with stripped or merged spaces would make wrong. ValueError when the shards and data.validation_documents do not
    hold the same documents, or limit has no room for one token of text after its BOS.
    """
    shards, tokenizer = data.validation, data.tokenizer
    stream = shards.tokens(0, len(shards))
    borders = [*np.flatnonzero(stream == shards.bos_id).tolist(), len(stream)]
    if len(borders) - 1 != len(data.validation_documents):
        raise ValueError(
            f"the validation shards hold {len(borders) - 1} documents and the validation text "
            f"{len(data.validation_documents)}; prepare the data again"
        )
    limit = len(stream) if limit is None else limit
    decoded_bytes = raw_bytes = documents = 0
    end = 0
    for text, border, next_border in zip(data.validation_documents, borders, borders[1:], strict=False):
        tokens = stream[border + 1 : next_border]
        if next_border > limit:
            kept, characters = _cut(data, text, limit - border - 1)
            tokens, text = tokens[:kept], text[:characters]
        if len(tokens) > 0:
            documents += 1
            end = border + 1 + len(tokens)
            decoded_bytes += len(tokenizer.decode(tokens).encode())
            raw_bytes += len(text.encode())
        if next_border >= limit:
            break
    if documents == 0:
        raise ValueError(f"validation_tokens is {limit}, too few for one token of text; raise it")
    return ValidationPiece(end, documents, decoded_bytes, raw_bytes)


def _cut(data: PreparedData, text: str, room: int) -> tuple[int, int]:
    """Return the most tokens, up to room, that end between two characters of text, and how many characters they are."""
    _, spans = data.tokenizer.encode_with_spans(text)
    kept = max(room, 0)
    while kept > 0 and spans[kept][0] < spans[kept - 1][1]:
        kept -= 1
    return kept, spans[kept - 1][1] if kept else 0
