"""Encoding in batches: the order, the counts, and what a process may not do."""

from pathlib import Path

import numpy as np
import pytest

from trihybrid.data import encode
from trihybrid.data.encode import encode_documents, encode_each
from trihybrid.data.sentencepiece import open_tokenizer
from trihybrid.data.tokens import Tokenizer


def test_batches_join_to_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 10)
    texts = ["a", "bcd", "\u00e9" * 30, "x", "yz" * 5, "end"]
    batches = list(encode_documents(iter(texts), Tokenizer.bytes()))
    assert [batch.documents for batch in batches] == [3, 2, 1]
    stream = np.concatenate([batch.tokens_N for batch in batches])
    assert stream.tolist() == [
        token for text in texts for token in (2, *(byte + 4 for byte in text.encode()))
    ]
    assert sum(batch.text_bytes for batch in batches) == sum(len(text.encode()) for text in texts)


def test_many_at_once_are_each_alone(sentencepiece_model: Path) -> None:
    texts = ["", "a", "<bos>baba<eos>", " \u4e2d\u6587 ", "\x01", "delo " * 300, "\u00e9\n\t"]
    for tokenizer in (Tokenizer.bytes(), open_tokenizer(sentencepiece_model)):
        wanted = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_many(texts) == wanted
        assert list(encode_each(iter(texts), tokenizer)) == wanted


def test_documents_that_encode_to_nothing_are_counted(sentencepiece_model: Path) -> None:
    (batch,) = encode_documents(["\x01", "baba", "\x02\x03"], open_tokenizer(sentencepiece_model))
    assert (batch.documents, batch.skipped, batch.text_bytes) == (1, 2, 4)
    (nothing,) = encode_documents(["\x01"], open_tokenizer(sentencepiece_model))
    assert (nothing.tokens_N.size, nothing.documents, nothing.skipped) == (0, 0, 1)


@pytest.mark.long
def test_two_processes_give_the_same_batches(
    sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 200)
    tokenizer = open_tokenizer(sentencepiece_model)
    texts = [f"baba delo {number} \u4e2d\u6587 " * (number % 7 + 1) for number in range(60)]
    alone = list(encode_documents(texts, tokenizer))
    shared = list(encode_documents(texts, tokenizer, processes=2))
    assert len(alone) == len(shared) > 10
    for one, other in zip(alone, shared, strict=True):
        assert np.array_equal(one.tokens_N, other.tokens_N)
        assert (one.documents, one.text_bytes, one.skipped) == (
            other.documents,
            other.text_bytes,
            other.skipped,
        )


def test_no_process_is_refused() -> None:
    with pytest.raises(ValueError, match="processes is 0"):
        encode_documents(["a"], Tokenizer.bytes(), processes=0)
