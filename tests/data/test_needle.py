"""Needles: the value asked for at the end is the one that was planted, at the distance that is told."""

import pytest

from trihybrid.data import Tokenizer, encode_probe
from trihybrid.data.needle import needle_documents

FILLER = ["It is a truth universally acknowledged,\nthat a single man in possession", "of a good fortune"]


@pytest.mark.parametrize("joiner", ["", " "])
@pytest.mark.parametrize("pairs", [1, 3])
def test_answers_are_the_planted_values(joiner: str, pairs: int) -> None:
    documents = needle_documents(20, 300, FILLER, pairs, 26, joiner, seed=4)
    depths = set()
    for document in documents:
        assert len(document.text) == 300
        assert document.text.startswith("recall: ") and len(document.answers) == pairs
        for offset, distance in document.answers:
            width = len(joiner) + 2
            asked, planted = (document.text[at + 1 - width : at + 1] for at in (offset, offset - distance))
            assert asked == planted and asked[0].isupper() and asked[-1].islower()
            depths.add(offset - distance)
    assert min(depths) < 100 and max(depths) > 200
    probe = encode_probe(documents, Tokenizer.bytes(), 301)
    assert int(probe.answer_NT.sum()) == 20 * pairs


def test_a_seed_is_a_set_of_documents() -> None:
    one, same, other = (needle_documents(3, 200, FILLER, 2, 26, "", seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("change", [{"count": 0}, {"pairs": 27}, {"characters": 63}, {"filler": ["short"]}])
def test_numbers_out_of_range_are_refused(change: dict) -> None:
    good = {"count": 1, "characters": 64, "filler": FILLER, "pairs": 1, "values": 26, "joiner": "", "seed": 0}
    needle_documents(**good)
    with pytest.raises(ValueError, match="allowed are at least 1, 1 to 26, 1 to 26, at least 64"):
        needle_documents(**good | change)
