"""Planted key-value pairs: text on which nothing but recall helps (multi-query associative recall).

A document plants pairs in one round and asks for all of them again in every later round, each time in another
order:

    recall: Kq Za Xm; Xm Kq Za; Za Xm Kq.

Keys are distinct upper-case letters, values lower-case letters drawn uniformly, so a value after the first
round follows from its key's earlier value and from nothing else: chance is 1 / `values`. With the byte
tokenizer a key and a value are one token each. The distance back to the last copy of a pair runs from a few
characters (last of a round, first of the next) to nearly two rounds; filler dots between rounds stretch it.

A small model that trains on documents of one large size stays at chance for long. Documents of all sizes up
to that one cure it: what is learned on few pairs carries over to many. Training therefore mixes sizes
(`fewest_pairs`).

Shape letters: N documents, T tokens.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .tokens import TextTokenizer


@dataclass(frozen=True)
class RecallDocument:
    """One document.

    text: the text.
    answers: for each answer, the character offset of its value, and how many characters further back the
        pair's last copy has it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class RecallSet:
    """Encoded documents.

    tokens_NT: int64 [N, T], BOS first, padded at the end.
    answer_NT: bool [N, T], True where the token is an answer, to be predicted from the tokens before it.
    distance_NT: int64 [N, T], tokens back to the last earlier copy of the answer's pair; 0 where there is no
        answer.
    """

    tokens_NT: Tensor
    answer_NT: Tensor
    distance_NT: Tensor


def recall_documents(
    count: int,
    pairs: int,
    rounds: int,
    seed: int,
    values: int = 26,
    gap: int = 0,
    joiner: str = "",
    fewest_pairs: int | None = None,
) -> list[RecallDocument]:
    """Draw documents; the first n of a larger count are the same n documents.

    Args:
        count: how many, >= 0.
        pairs: planted pairs of a document, 1..26.
        rounds: rounds of all pairs, the planting included, >= 2: a document has pairs * (rounds - 1) answers.
        seed: >= 0.
        values: letters that a value is drawn from ("a" onwards), 1..26.
        gap: most filler characters between two rounds, drawn uniformly from 0..gap.
        joiner: between key and value: "", or " " for tokenizers that would merge the two letters.
        fewest_pairs: draw the number of pairs of each document from fewest_pairs..pairs; a smaller document
            has more rounds, so that all are about as long. None: every document has `pairs`.

    Raises:
        ValueError: for a number out of range.
    """
    fewest = pairs if fewest_pairs is None else fewest_pairs
    bounds = (
        ("count", count, 0, None),
        ("pairs", pairs, 1, 26),
        ("fewest_pairs", fewest, 1, pairs),
        ("rounds", rounds, 2, None),
        ("seed", seed, 0, None),
        ("values", values, 1, 26),
        ("gap", gap, 0, None),
    )
    for name, value, low, high in bounds:
        if value < low or (high is not None and value > high):
            raise ValueError(
                f"{name} is {value}, must be at least {low}" + (f" and at most {high}" if high else "")
            )
    if joiner not in ("", " "):
        raise ValueError(f'joiner is {joiner!r}, must be "" or " "')
    generator = np.random.Generator(np.random.Philox(key=seed))
    documents = []
    for _ in range(count):
        size = pairs if fewest == pairs else int(generator.integers(fewest, pairs + 1))
        length = max(rounds, pairs * rounds // size)
        documents.append(_draw_document(generator, size, length, values, gap, joiner))
    return documents


def encode_probe(documents: Sequence[RecallDocument], tokenizer: TextTokenizer, length: int) -> RecallSet:
    """Encode documents into rows of `length` tokens, BOS included.

    Raises:
        ValueError: for no documents, a document that does not fit, or a tokenizer for which a value is not
            one token (a leading space may belong to it).
    """
    if not documents:
        raise ValueError("no recall documents to encode")
    tokens_NT = torch.full((len(documents), length), tokenizer.pad_id, dtype=torch.int64)
    answer_NT = torch.zeros(len(documents), length, dtype=torch.bool)
    distance_NT = torch.zeros(len(documents), length, dtype=torch.int64)
    for row, document in enumerate(documents):
        ids, spans = tokenizer.encode_with_spans(document.text)
        if len(ids) + 1 > length:
            raise ValueError(
                f"recall document {row} takes {len(ids) + 1} tokens with BOS, length is {length}: "
                "raise the length or lower pairs, rounds or gap"
            )
        tokens_NT[row, : len(ids) + 1] = torch.tensor([tokenizer.bos_id, *ids])
        place = {end: number for number, (_, end) in enumerate(spans)}
        for offset, distance in document.answers:
            here, earlier = (
                _value_token(document.text, at, spans, place) for at in (offset, offset - distance)
            )
            answer_NT[row, here + 1] = True
            distance_NT[row, here + 1] = here - earlier
    return RecallSet(tokens_NT, answer_NT, distance_NT)


def mix_documents(
    text_documents: Sequence[str], recall_documents: Sequence[RecallDocument], seed: int
) -> list[str]:
    """All texts of both kinds in one shuffled order that depends on the seed alone."""
    texts = [*text_documents, *(document.text for document in recall_documents)]
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(texts))
    return [texts[number] for number in order]


def draw_pairs(generator: np.random.Generator, pairs: int, values: int, joiner: str) -> list[str]:
    """Pairs of a key, a capital that no other pair has, and one of the first `values` small letters."""
    keys = generator.permutation(26)[:pairs]
    drawn = generator.integers(values, size=pairs)
    return [
        string.ascii_uppercase[key] + joiner + string.ascii_lowercase[value]
        for key, value in zip(keys, drawn, strict=True)
    ]


def _draw_document(
    generator: np.random.Generator, pairs: int, rounds: int, values: int, gap: int, joiner: str
) -> RecallDocument:
    planted = draw_pairs(generator, pairs, values, joiner)
    text = "recall:"
    latest: dict[int, int] = {}
    answers = []
    for number in range(rounds):
        if number:
            filler = int(generator.integers(gap + 1))
            text += ";" + (" " + "." * filler if filler else "")
        for pair in generator.permutation(pairs).tolist():
            text += " " + planted[pair]
            offset = len(text) - 1
            if number:
                answers.append((offset, offset - latest[pair]))
            latest[pair] = offset
    return RecallDocument(text + ".\n", tuple(answers))


def _value_token(text: str, offset: int, spans: list[tuple[int, int]], place: dict[int, int]) -> int:
    """Number of the token that is the value at this offset, with nothing but spaces before it."""
    number = place.get(offset + 1)
    start = offset + 1 if number is None else spans[number][0]
    if number is None or text[start : offset + 1].strip() != text[offset]:
        raise ValueError(
            f"the value {text[offset]!r} at character {offset} of {text[:20]!r}... is not one token: "
            'put a space between key and value (joiner " ") or use the byte tokenizer'
        )
    return number
