"""SentencePiece models as tokenizers: what they decode to, what they refuse, and which file a name opens."""

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.data.probes import encode_probe, recall_documents
from trihybrid.data.section import DataSection, RecallSection, prepare
from trihybrid.data.sentencepiece import SentencePieceTokenizer, open_tokenizer
from trihybrid.data.tokens import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.from_file(sentencepiece_model)


def test_the_numbers_of_the_challenge(tokenizer: SentencePieceTokenizer, sentencepiece_model: Path) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 384
    assert tokenizer.hash == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()


# Characters that the normalisation leaves alone, between single spaces.
words = st.text(st.sampled_from("bakidelo\u00e917.<>_\u4e2d\u6587\U0001f600"), min_size=1, max_size=8)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(parts=st.lists(words, max_size=8))
def test_normal_text_comes_back(sentencepiece_model: Path, parts: list[str]) -> None:
    tokenizer = open_tokenizer(sentencepiece_model)
    text = " ".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert not {0, 1, 2, 3} & set(ids)


def test_special_strings_in_a_text_are_ordinary(tokenizer: SentencePieceTokenizer) -> None:
    text = "<s> </s> <pad> <unk> <0x41>"
    ids = tokenizer.encode(text)
    assert min(ids) > 3
    assert tokenizer.decode(ids) == text


def test_bytes_that_are_not_utf8_are_replaced(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.decode([4 + 0xF0, 4 + 0x9F]) == "\ufffd\ufffd"


def test_spans_cover_the_text_in_order(tokenizer: SentencePieceTokenizer) -> None:
    text = "baba r\u00e9 \U0001f600 lo"
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert "".join(text[start:stop] for start, stop in spans) == text


def test_probes_can_be_encoded(tokenizer: SentencePieceTokenizer) -> None:
    documents = recall_documents(3, 4, 3, seed=0, joiner=" ")
    probes = encode_probe(documents, tokenizer, 256)
    assert probes.answer_NT.sum() == sum(len(document.answers) for document in documents)
    answer = probes.tokens_NT[0][probes.answer_NT[0]].tolist()
    expected = [documents[0].text[offset] for offset, _ in documents[0].answers]
    assert [tokenizer.decode([token]).strip() for token in answer] == expected


def test_a_conversion_recipe_may_name_one(sentencepiece_model: Path, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"baba delo {number} " * 20)
    recall = RecallSection(pairs=4, rounds=2, joiner=" ", evaluation_documents=2)
    section = DataSection(source=str(tmp_path), tokenizer=str(sentencepiece_model), recall=recall)
    data = prepare(section, tmp_path / "data")
    documents = list(data.validation.documents())
    assert [data.tokenizer.decode(document) + " " for document in documents] == data.validation_documents


def test_saved_opened_and_sent_to_a_process_it_is_the_same(
    tokenizer: SentencePieceTokenizer, sentencepiece_model: Path, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    sent = pickle.loads(pickle.dumps(tokenizer))
    for other in (open_tokenizer(tmp_path), open_tokenizer(tmp_path / "tokenizer.model"), sent):
        assert isinstance(other, SentencePieceTokenizer)
        assert other.hash == tokenizer.hash
        assert other.encode("baba delo 12") == tokenizer.encode("baba delo 12")


def test_a_name_opens_the_right_kind(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    assert open_tokenizer("bytes").hash == Tokenizer.bytes().hash
    tokenizer.save(tmp_path)
    Tokenizer.bytes().save(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert open_tokenizer(name).hash == Tokenizer.bytes().hash
    with pytest.raises(ValueError, match=r'nothing\.model does not exist: give "bytes"'):
        open_tokenizer(tmp_path / "nothing.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        open_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        SentencePieceTokenizer.from_file(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100])
def test_what_is_no_model_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model") as caught:
        open_tokenizer(tmp_path / "bad.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_id": -1}, "has no pad token: train it with --pad_id"),
        ({"bos_id": -1}, "has no bos token"),
    ],
)
def test_a_model_that_lacks_something_is_refused(
    train_sentencepiece: Callable[..., Path], changes: dict, message: str, tmp_path: Path
) -> None:
    file = train_sentencepiece(tmp_path / "x.model", **changes)
    with pytest.raises(ValueError, match=message):
        open_tokenizer(file)


def test_a_model_without_a_lone_space_is_refused(sentencepiece_model: Path, tmp_path: Path) -> None:
    """It would spell a space as three bytes and so inflate the count by which its loss is divided."""
    content = sentencepiece_model.read_bytes()
    changed = content.replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x96\x82")
    assert sum(a != b for a, b in zip(content, changed, strict=True)) == 1
    (tmp_path / "x.model").write_bytes(changed)
    with pytest.raises(ValueError, match=r"x\.model has no piece for a lone space"):
        open_tokenizer(tmp_path / "x.model")


def test_ids_outside_the_vocabulary_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(ValueError, match="ids span 5 to 384, the vocabulary 0 to 383"):
        tokenizer.decode([5, 384])
    with pytest.raises(ValueError, match="ids span -1 to -1"):
        tokenizer.bytes_of([-1])


def test_a_missing_library_says_what_to_install(
    sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install trihybrid\[data\]"):
        open_tokenizer(sentencepiece_model)
