"""A needle in a haystack: pairs planted somewhere in text of any length, and asked for at its end.

    recall: ... It is a truth universally Kq Za; acknowledged, that a single man ... Za Kq.

Keys and values are those of the recall probes: nothing in the text between gives the answer, and chance is
1 / `values`. The document begins as a recall document does, so that a model that learned those knows what is asked.
"""

from collections.abc import Sequence

import numpy as np

from .probes import RecallDocument, draw_pairs


def needle_documents(
    count: int, characters: int, filler: Sequence[str], pairs: int, values: int, joiner: str, seed: int
) -> list[RecallDocument]:
    """Draw documents.

    Args:
        count: how many, >= 1.
        characters: of each document, about; at least 64.
        filler: texts that the needle lies in, taken up in turn from a drawn one on; whitespace becomes single spaces.
        pairs: planted together, and asked for in another order, 1..26.
        values: letters that a value is drawn from, 1..26.
        joiner: between key and value, "" or " ".
        seed: decides texts, keys, values and depths, >= 0. The depth is uniform.

    Raises:
        ValueError: numbers out of range, or filler of fewer than 64 characters.
    """
    haystack = "".join(" ".join(text.split()) + " " for text in filler)
    if count < 1 or not 1 <= pairs <= 26 or not 1 <= values <= 26 or characters < 64 or len(haystack) < 64:
        raise ValueError(
            f"count is {count}, pairs {pairs}, values {values}, characters {characters}, filler {len(haystack)} "
            "characters; allowed are at least 1, 1 to 26, 1 to 26, at least 64 and at least 64"
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    return [_draw(generator, characters, haystack, pairs, values, joiner) for _ in range(count)]


def _draw(
    generator: np.random.Generator, characters: int, haystack: str, pairs: int, values: int, joiner: str
) -> RecallDocument:
    planted = draw_pairs(generator, pairs, values, joiner)
    needle = "".join(f" {pair}" for pair in planted)
    length = max(2, characters - 2 * len(needle) - len("recall: ;;.\n"))
    start = int(generator.integers(len(haystack)))
    text = (haystack[start:] + haystack * (1 + length // len(haystack)))[:length]
    depth = int(generator.integers(length))
    before = f"recall: {text[:depth]}"
    document = f"{before}{needle};{text[depth:]};"
    answers = []
    for number in generator.permutation(pairs).tolist():
        document += f" {planted[number]}"
        offset = len(document) - 1
        width = len(planted[0]) + 1
        answers.append((offset, offset - (len(before) + (number + 1) * width - 1)))
    return RecallDocument(document + ".\n", tuple(answers))
