"""Recall probes: an answer follows from its key at the stated distance, and chance is 1 / values."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from trihybrid.data.probes import RecallDocument, encode_probe, mix_documents, recall_documents
from trihybrid.data.tokens import Tokenizer

BYTES = Tokenizer.bytes()

shapes = st.fixed_dictionaries(
    {
        "pairs": st.integers(1, 26),
        "rounds": st.integers(2, 5),
        "seed": st.integers(0, 2**32),
        "values": st.integers(1, 26),
        "gap": st.integers(0, 30),
        "joiner": st.sampled_from(["", " "]),
    }
)


def merging_tokenizer() -> Tokenizer:
    """Splits at spaces only, so that "Kq" becomes one token and "q" alone another."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    letters = "abcdefghijklmnopqrstuvwxyz"
    for word in [" " + first + second for first in letters.upper() for second in ["", *letters]]:
        words[word] = len(words)
    for word in [" " + letter for letter in letters]:
        words[word] = len(words)
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" [A-Z][a-z]?| [a-z]|[;.:\n]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, "<bos>", "<eos>", "<pad>")


@settings(deadline=None, max_examples=30, derandomize=True)
@given(shape=shapes)
def test_every_answer_is_a_direct_lookup(shape: dict) -> None:
    for document in recall_documents(3, **shape):
        offsets = dict(document.answers)
        assert len(offsets) == shape["pairs"] * (shape["rounds"] - 1)
        latest: dict[str, tuple[str, int]] = {}
        found = {}
        for match in re.finditer(f"([A-Z]){shape['joiner']}([a-z])", document.text):
            key, value = match.groups()
            offset = match.end() - 1
            if key in latest:
                assert value == latest[key][0]
                found[offset] = offset - latest[key][1]
            latest[key] = (value, offset)
        assert found == offsets
        assert len(latest) == shape["pairs"]
        assert {value for value, _ in latest.values()} <= set("abcdefghijklmnopqrstuvwxyz"[: shape["values"]])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(shape=shapes)
def test_encoding_marks_the_answers_and_their_distances(shape: dict) -> None:
    documents = recall_documents(3, **shape)
    length = max(len(document.text) for document in documents) + 3
    probe = encode_probe(documents, BYTES, length)
    for row, document in enumerate(documents):
        size = len(document.text) + 1
        assert probe.tokens_NT[row].tolist() == [2, *BYTES.encode(document.text)] + [0] * (length - size)
        marked = probe.answer_NT[row].nonzero().flatten().tolist()
        assert marked == [offset + 1 for offset, _ in document.answers]
        assert probe.distance_NT[row, marked].tolist() == [distance for _, distance in document.answers]
    assert (probe.distance_NT[~probe.answer_NT] == 0).all()
    rows, columns = probe.answer_NT.nonzero(as_tuple=True)
    earlier = probe.tokens_NT[rows, columns - probe.distance_NT[rows, columns]]
    assert torch.equal(earlier, probe.tokens_NT[rows, columns])


def test_the_first_document_is_pinned() -> None:
    (document,) = recall_documents(1, pairs=3, rounds=3, seed=0)
    assert document.text == "recall: Ml Ak Yh; Ml Ak Yh; Yh Ak Ml.\n"
    assert re.fullmatch(r"recall:( [A-Z][a-z]){3}(;( [A-Z][a-z]){3}){2}\.\n", document.text)


def test_drawing_is_deterministic_and_stable_under_a_larger_count() -> None:
    few = recall_documents(3, 16, 4, seed=7, gap=9)
    assert recall_documents(10, 16, 4, seed=7, gap=9)[:3] == few
    assert recall_documents(3, 16, 4, seed=8, gap=9) != few


def test_mixed_sizes_have_about_one_length() -> None:
    documents = recall_documents(300, 16, 4, seed=0, fewest_pairs=2)
    sizes = Counter()
    for document in documents:
        latest = dict(re.findall("([A-Z])([a-z])", document.text))
        assert all(latest[key] == value for key, value in re.findall("([A-Z])([a-z])", document.text))
        sizes[len(latest)] += 1
        mentions = document.text.count(" ")
        assert 64 - len(latest) < mentions <= 64
        assert len(document.answers) == mentions - len(latest)
    assert set(sizes) == set(range(2, 17))


def test_chance_is_one_over_the_alphabet() -> None:
    """The best constant guess, and the best guess from the key alone, are right 1 / values of the time."""
    documents = recall_documents(2000, pairs=16, rounds=2, seed=0, values=8)
    planted = [
        pair for document in documents for pair in re.findall("[A-Z][a-z]", document.text.split(";")[0])
    ]
    values = Counter(value for _, value in planted)
    assert len(planted) == 32_000
    assert len(values) == 8
    assert max(abs(count / len(planted) - 1 / 8) for count in values.values()) < 0.01
    given_key = Counter(planted)
    best = sum(max(given_key[key + value] for value in values) for key in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert best / len(planted) < 1 / 8 + 0.02


def test_distances_spread() -> None:
    def distances(**shape: int) -> torch.Tensor:
        probe = encode_probe(recall_documents(50, seed=0, rounds=4, **shape), BYTES, 2000)
        return probe.distance_NT[probe.answer_NT]

    plain = distances(pairs=16)
    assert plain.min() <= 7
    assert 46 <= plain.double().mean() <= 52  # a round is 48 characters and one semicolon
    assert 88 <= plain.max() <= 94
    wide = distances(pairs=16, gap=400)
    assert wide.min() <= 32
    assert wide.max() >= 400


def test_a_value_that_is_not_one_token_is_refused_and_a_space_cures_it() -> None:
    tokenizer = merging_tokenizer()
    with pytest.raises(ValueError, match=r'is not one token: put a space .*joiner " "'):
        encode_probe(recall_documents(1, 4, 2, seed=0), tokenizer, 200)
    probe = encode_probe(recall_documents(1, 4, 2, seed=0, joiner=" "), tokenizer, 200)
    assert probe.answer_NT.sum() == 4
    rows, columns = probe.answer_NT.nonzero(as_tuple=True)
    earlier = probe.tokens_NT[rows, columns - probe.distance_NT[rows, columns]]
    assert torch.equal(earlier, probe.tokens_NT[rows, columns])
    assert (probe.distance_NT[rows, columns] >= 2).all()


def test_a_document_that_does_not_fit_is_refused() -> None:
    documents = recall_documents(2, 4, 2, seed=0)
    size = len(documents[0].text) + 1
    assert encode_probe(documents, BYTES, size).tokens_NT.shape == (2, size)
    with pytest.raises(
        ValueError, match=f"recall document 0 takes {size} tokens with BOS, length is {size - 1}"
    ):
        encode_probe(documents, BYTES, size - 1)
    with pytest.raises(ValueError, match="no recall documents"):
        encode_probe([], BYTES, size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", -1),
        ("fewest_pairs", 3),
        ("pairs", 27),
        ("pairs", 0),
        ("rounds", 1),
        ("values", 27),
        ("gap", -1),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        recall_documents(**{"count": 1, "pairs": 2, "rounds": 2, "seed": 0, name: value})


def test_an_unknown_joiner_is_refused() -> None:
    with pytest.raises(ValueError, match="joiner is '='"):
        recall_documents(1, 2, 2, 0, joiner="=")


def test_mixing_keeps_every_document_and_shuffles() -> None:
    texts = [f"text {number}" for number in range(20)]
    probes = [RecallDocument(f"recall {number}", ()) for number in range(10)]
    mixed = mix_documents(texts, probes, seed=1)
    assert sorted(mixed) == sorted([*texts, *(probe.text for probe in probes)])
    assert mixed == mix_documents(texts, probes, seed=1)
    assert mixed != mix_documents(texts, probes, seed=2)
    assert mixed[:20] != texts
