"""Tokenizers: lossless bytes, exact byte counts, no special token from text, the same ids in transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from trihybrid.data.tokens import Tokenizer, byte_characters

BYTES = Tokenizer.bytes()


def gemma_like() -> tokenizers.Tokenizer:
    """SentencePiece-like BPE with byte fallback, as Gemma has it; no post-processor."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "a", "b", "\u00e9", "ab", "\u2581ab", "\u2581\u2581"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("a", "b"), ("\u2581", "ab"), ("\u2581", "\u2581")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:4]])
    backend.enable_truncation(5)
    return backend


def mistral_like() -> tokenizers.Tokenizer:
    """As `gemma_like`, with the space that Llama 2 and Mistral put before a text and strip again when they decode."""
    backend = gemma_like()
    backend.no_truncation()
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def test_the_table_of_ids() -> None:
    assert (BYTES.pad_id, BYTES.eos_id, BYTES.bos_id, BYTES.vocab_size) == (0, 1, 2, 260)
    text = "\x00 aZ~\u00e9\U0001f600\n"
    assert BYTES.encode(text) == [byte + 4 for byte in text.encode()]
    assert len(set(byte_characters())) == 256
    assert set(byte_characters()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@settings(deadline=None, max_examples=30, derandomize=True)
@given(text=st.text(max_size=60))
def test_bytes_are_lossless_and_counted(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    assert ids == [byte + 4 for byte in text.encode()]
    assert BYTES.bytes_of(ids) == len(text.encode())


@pytest.mark.parametrize("text", ["<bos>", "a<eos>b", "<pad><unk>", " <bos> ", "<eos>\n"])
def test_special_strings_are_ordinary_text(text: str, tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    for tokenizer in (BYTES, Tokenizer.from_file(tmp_path)):
        assert tokenizer.encode(text) == [byte + 4 for byte in text.encode()]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_have_no_text_and_no_bytes() -> None:
    ids = [2, *BYTES.encode("hi"), 1, 0, 3]
    assert BYTES.decode(ids) == "hi"
    assert BYTES.bytes_of(ids) == 2
    assert BYTES.bytes_of([]) == 0


@pytest.mark.parametrize("ids", [[260], [-1]])
def test_an_id_outside_the_vocabulary_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="vocabulary 0 to 259"):
        BYTES.bytes_of(ids)


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "don't  stop \u00e9\U0001f600\n"
    assert loaded(text)["input_ids"] == [2, *BYTES.encode(text)]
    assert loaded(text, add_special_tokens=False)["input_ids"] == BYTES.encode(text)
    assert loaded.decode(BYTES.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id, len(loaded)) == (0, 1, 2, 260)


def test_the_hash_survives_saving_and_tells_tokenizers_apart(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").hash == BYTES.hash == Tokenizer.bytes().hash
    assert Tokenizer(gemma_like(), "<bos>", "<eos>", "<pad>").hash != BYTES.hash


@settings(deadline=None, max_examples=30, derandomize=True)
@given(text=st.text(alphabet=st.sampled_from("ab \u00e9\U0001f600z<>0xe"), max_size=40))
def test_byte_fallback_is_counted_as_decoded(text: str) -> None:
    tokenizer = Tokenizer(gemma_like(), "<bos>", "<eos>", "<pad>")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == sum(tokenizer.bytes_of([number]) for number in ids)
    assert tokenizer.bytes_of(ids) == len(text.encode())


@settings(deadline=None, max_examples=50, derandomize=True)
@given(text=st.text(alphabet=st.sampled_from("ab \u00e9\U0001f600z<>0xe"), max_size=40))
def test_a_space_that_the_decoder_strips_is_not_counted(text: str) -> None:
    """At the head of a document only, where the tokenizer had put it."""
    tokenizer = Tokenizer(mistral_like(), "<bos>", "<eos>", "<pad>")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert tokenizer.bytes_of([tokenizer.bos_id, *ids]) == len(text.encode())
    base_V, lead_V, border_V = tokenizer.byte_rules()
    assert {number for number in range(tokenizer.vocab_size) if border_V[number]} == {0, 1, 2, 3}
    assert [number for number in range(tokenizer.vocab_size) if lead_V[number]] == [260, 265, 266]
    assert base_V[[260, 265, 266]].tolist() == [0, 2, 1]


def test_what_the_tokenizer_does_not_name_is_the_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen names no BOS, Llama and Mistral no padding."""
    backend = gemma_like()
    fields = json.loads(backend.to_str())
    text = json.dumps(fields).replace("<bos>", "<|endoftext|>").replace("<pad>", "<|reserved|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<eos>"}))
    with pytest.raises(ValueError, match="bos_token '<bos>' is not in the tokenizer's vocabulary"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": [3, 1]}))
    with caplog.at_level("INFO", logger="trihybrid.data.tokens"):
        tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 1)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "bos_token is <|endoftext|>, by config.json",
        "no pad_token; rows are filled with <eos>",
    ]
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_file(tmp_path / "saved")
    assert (again.bos_id, again.eos_id, again.pad_id) == (2, 1, 1)
    nested = {"text_config": {"bos_token_id": 3, "pad_token_id": 0}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    nested_tokenizer = Tokenizer.from_file(tmp_path)
    assert (nested_tokenizer.bos_id, nested_tokenizer.pad_id) == (3, 0)


def test_a_loaded_tokenizer_gets_a_bos_and_loses_truncation(tmp_path: Path) -> None:
    gemma_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert len(tokenizer.encode("z" * 20)) == 20
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a b")["input_ids"] == [2, *tokenizer.encode("a b")]


def test_names_of_special_tokens_come_from_the_config(tmp_path: Path) -> None:
    backend = gemma_like()
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert Tokenizer.from_file(tmp_path).bos_id == backend.token_to_id("<s>") == 267
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<nothing>"}')
    with pytest.raises(ValueError, match="pad_token '<nothing>' is not in"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.from_file(tmp_path)
    for value in (5, ["<s>"], {"content": 5}, {"text": "<s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": value}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token is .*; it must be a string"):
            Tokenizer.from_file(tmp_path)


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path)


def test_a_decoder_without_fixed_bytes_is_refused() -> None:
    backend = gemma_like()
    backend.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="has no fixed bytes"):
        Tokenizer(backend, "<bos>", "<eos>", "<pad>").bytes_of([4])
