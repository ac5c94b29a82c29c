"""The scored piece of the text: bytes by document, cut at a limit between two characters."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trihybrid.evaluate import validation_piece


# The fixture is only read.
@given(limit=st.integers(2, 1000))
@settings(
    deadline=None,
    max_examples=30,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_limit_is_kept_and_bytes_are_those_of_the_prefix(prepared, limit: int) -> None:
    piece = validation_piece(prepared, limit)
    assert piece.tokens <= limit
    # The longest character of the text has three bytes, so at most two tokens (and a BOS behind) are given up.
    assert piece.tokens >= min(limit, len(prepared.validation)) - 3
    ids = prepared.validation.tokens(0, piece.tokens)
    decoded = prepared.tokenizer.decode(ids)
    assert "\ufffd" not in decoded
    assert piece.decoded_bytes == piece.raw_bytes == len(decoded.encode())
    assert "".join(prepared.validation_documents).startswith(decoded)
    assert piece.documents == (ids == prepared.validation.bos_id).sum()
    assert piece.decoded_bytes == piece.tokens - piece.documents


def test_raw_bytes_are_of_the_text_where_the_tokenizer_loses_something(prepared) -> None:
    class Lossy:
        def decode(self, ids) -> str:
            return "ab"

    piece = validation_piece(replace(prepared, tokenizer=Lossy()), None)
    assert piece.decoded_bytes == 2 * len(prepared.validation_documents)
    assert piece.raw_bytes == prepared.validation.text_bytes


def test_refusals(prepared) -> None:
    with pytest.raises(ValueError, match="validation_tokens is 1"):
        validation_piece(prepared, 1)
    with pytest.raises(ValueError, match="hold 3 documents and the validation text 2"):
        validation_piece(replace(prepared, validation_documents=prepared.validation_documents[:2]), None)
