"""A streamed text is the text, cut before its first stop string wherever tokens end; no more than that was shown."""

import pytest
import tokenizers
from tokenizers import decoders, models

from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.text_stream import TextStream

TEXTS = ["", "plain", "\u00e9t\u00e9 \u20ac \U0001f600!", "a\U0001f600\U0001f600\u20acb"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token is a byte, so that characters lie across tokens."""
    return Tokenizer.bytes()


def stream(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, stops)
    return [*(text.push(token) for token in ids), text.finish()], text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer, text: str) -> None:
    parts, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    # Every character comes with the token that completes it.
    shown = 0
    for part, end in zip(parts, range(1, len(text.encode()) + 1), strict=False):
        shown += len(part)
        assert shown == len(text.encode()[:end].decode(errors="ignore"))


@pytest.mark.parametrize("data", [b"ok\xff\xfe\xfd\xfc\xfb\xfa then", b"a\xe2\x82", b"\xf0\x9f\x98b"])
def test_bytes_that_are_no_text_come_as_the_decoder_has_them(tokenizer: Tokenizer, data: bytes) -> None:
    ids = [byte + 4 for byte in data]
    parts, _ = stream(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)


def spoken(words: list[str], decoder: decoders.Decoder) -> Tokenizer:
    """A tokenizer with these words, the first of which has the number 3."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.decoder = decoder
    return Tokenizer(backend, "<bos>", "<eos>", "<pad>")


def test_a_decoder_that_drops_the_first_space_drops_it_once() -> None:
    plain = spoken(["\u2581a", "b"], decoders.Metaspace())
    parts, _ = stream(plain, [3, 4, 3, 3, 4])
    assert "".join(parts) == plain.decode([3, 4, 3, 3, 4]) == "ab a ab"


STOPS = [
    (("END",), "some text END and more", "some text "),
    (("END",), "EEENENDEND", "EEEN"),
    (("\n\n", "User:"), "one\ntwo Use User: x\n\n", "one\ntwo Use "),
    # The one that is complete first decides, whatever begins before it.
    (("bcd", "c"), "abcd", "ab"),
    (("aab",), "aaab", "a"),
    (("\u20ac!",), "\u20ac\u20ac!x", "\u20ac"),
    (("never",), "neve", "neve"),
    (("never",), "nevne", "nevne"),
]


@pytest.mark.parametrize(("stops", "text", "wanted"), STOPS)
def test_a_text_ends_before_its_stop_string(
    tokenizer: Tokenizer, stops: tuple[str, ...], text: str, wanted: str
) -> None:
    parts, after = stream(tokenizer, tokenizer.encode(text), stops)
    assert "".join(parts) == wanted
    assert after.stopped == (wanted != text)
    if after.stopped:
        assert after.push(tokenizer.encode("x")[0]) == after.finish() == ""
    shown = ""
    for part in parts[:-1]:
        shown += part
        # Nothing that is shown may turn out to be the beginning of a stop string.
        assert wanted.startswith(shown)


def test_the_borders_of_tokens_do_not_matter() -> None:
    """The same text in tokens of one letter and in one token."""
    plain = spoken(["abcd", "a", "b", "c", "d"], decoders.Fuse())
    for ids in ([3], [4, 5, 6, 7]):
        assert "".join(stream(plain, ids, ("bcd", "c"))[0]) == "ab"


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(tokenizer, ("x", ""))
