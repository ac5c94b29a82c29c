"""The byte table: equal to the decoded bytes for every text, the challenge's own numbers, and a wrong one is caught."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.data.byte_table import ByteTable, byte_lengths, check_table
from trihybrid.data.sentencepiece import open_tokenizer
from trihybrid.data.shards import TokenShards, write_shards
from trihybrid.data.tokens import TextTokenizer, Tokenizer

TEXTS = ["baba delo 12 r\u00e9.", "\U0001f600 \u4e2d\u6587 x", "<s> z 7"]


def write(folder: Path, tokenizer: TextTokenizer, texts: list[str]) -> TokenShards:
    return write_shards(
        folder,
        [tokenizer.encode(text) for text in texts],
        tokenizer.vocab_size,
        tokenizer.bos_id,
        text_bytes=sum(len(text.encode()) for text in texts),
        tokenizer_hash=tokenizer.hash,
    )


# Every kind that a normaliser or a decoder could stumble over, beside letters and words of the model.
pieces = st.one_of(
    st.sampled_from(
        ["baba", " de", "\u4e2d\u6587", "  ", "\t", "\n", "\u3000", "\u2581", "12", "\u00bd", "\ufb01"]
    ),
    st.sampled_from(
        ["\U0001f600", "e\u0301", "\u200d", "\x00", "\x07", "\u00ad", "\ufeff", "\ufffd", "<0x41>"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)


@pytest.fixture(scope="session")
def both(sentencepiece_model: Path) -> list[TextTokenizer]:
    return [open_tokenizer(sentencepiece_model), Tokenizer.bytes()]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(parts=st.lists(pieces, min_size=2, max_size=20))
def test_the_count_is_the_length_of_the_decoded_text(both: list[TextTokenizer], parts: list[str]) -> None:
    for tokenizer in both:
        ids = np.array([tokenizer.bos_id, *tokenizer.encode("".join(parts))])
        decoded = len(tokenizer.decode(ids).encode())
        assert byte_lengths(tokenizer).count(ids[1:], ids[:-1]) == decoded == tokenizer.bytes_of(ids[1:])


def test_the_byte_tokenizer_counts_raw_bytes() -> None:
    tokenizer = Tokenizer.bytes()
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(" \u00e9\U0001f600"), tokenizer.bos_id])
    assert byte_lengths(tokenizer).lengths(ids[1:], ids[:-1]).tolist() == [1] * 7 + [0]


def test_the_rules_of_the_challenge_one_by_one(sentencepiece_model: Path) -> None:
    """base + (lead and not border): a control token has no bytes, a byte token one, and a space counts one byte
    unless it follows a control token."""
    tokenizer = open_tokenizer(sentencepiece_model)
    table = byte_lengths(tokenizer)
    text = " ".join(["baba", "baba", "\U0001f600"])
    ids = np.array(tokenizer.encode(text))
    assert table.count(ids, np.concatenate([[1], ids[:-1]])) == len(text.encode())
    lead = int(np.flatnonzero(table.lead_V & (table.base_V > 0))[0])
    space = int(np.flatnonzero(table.lead_V & (table.base_V == 0))[0])
    base = int(table.base_V[lead])
    byte = 4 + 0xF0
    cases = [(lead, byte, base + 1), (lead, 1, base), (lead, 3, base), (space, byte, 1), (space, 1, 0)]
    cases += [(byte, 1, 1), (byte, lead, 1), (1, byte, 0), (3, byte, 0), (0, 0, 0)]
    for target, previous, expected in cases:
        assert table.count(np.array([target]), np.array([previous])) == expected
    assert np.flatnonzero(table.border_V).tolist() == [0, 1, 2, 3]
    assert table.base_V[4:260].tolist() == [1] * 256


def test_the_check_passes_and_returns_the_bytes(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(sentencepiece_model)
    shards = write(tmp_path, tokenizer, TEXTS)
    assert check_table(shards, tokenizer) == sum(len(text.encode()) for text in TEXTS)
    assert check_table(shards, tokenizer, limit=1) == len(TEXTS[0].encode())


def test_a_space_counted_twice_is_caught(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(sentencepiece_model)
    shards = write(tmp_path, tokenizer, ["baba", *TEXTS])
    table = byte_lengths(tokenizer)
    twice = replace(table, base_V=table.base_V + table.lead_V)
    with pytest.raises(ValueError, match=r"document 1 decodes to 17 bytes, the byte table counts 20"):
        check_table(shards, tokenizer, twice)
    assert check_table(shards, tokenizer, twice, limit=1) == 4


def test_spaces_that_the_decoder_keeps_are_caught(
    train_sentencepiece: Callable[..., Path], tmp_path: Path
) -> None:
    """A model that keeps a space at the head of a document, which the challenge's count drops after BOS."""
    tokenizer = open_tokenizer(train_sentencepiece(tmp_path / "x.model", remove_extra_whitespaces=False))
    with pytest.raises(ValueError, match="document 2 decodes to 5 bytes, the byte table counts 4"):
        check_table(write(tmp_path / "s", tokenizer, ["baba", "ba ba", " baba"]), tokenizer)


def test_shards_of_another_tokenizer_are_refused(sentencepiece_model: Path, tmp_path: Path) -> None:
    shards = write(tmp_path, Tokenizer.bytes(), TEXTS)
    with pytest.raises(ValueError, match="was made with tokenizer"):
        check_table(shards, open_tokenizer(sentencepiece_model))


def test_bad_ids_are_refused() -> None:
    table = ByteTable(np.ones(3, dtype=np.int64), np.zeros(3, dtype=np.bool_), np.zeros(3, dtype=np.bool_))
    with pytest.raises(ValueError, match="ids span 0 to 3, the byte table 0 to 2"):
        table.count(np.array([0, 3]), np.array([0, 0]))
    with pytest.raises(ValueError, match="ids span -1 to 0"):
        table.count(np.array([0, 0]), np.array([0, -1]))
    with pytest.raises(ValueError, match="must be equal"):
        table.count(np.array([0]), np.array([0, 1]))
    assert table.count(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 0
