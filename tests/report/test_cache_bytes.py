"""The break-even context, by hand and as a law."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.report.cache_bytes import CacheBytes, break_even, cache_bytes, compare

SIZES = st.builds(CacheBytes, st.integers(0, 10_000), st.integers(0, 10_000_000))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(SIZES, SIZES, st.integers(1, 2**20))
def test_the_sentence_says_what_the_sizes_say(teacher, student, context):
    crossing, sentence = break_even(teacher, student), compare(teacher, student)
    fewer = student.at(context) < teacher.at(context)
    if crossing is not None:
        assert student.at(crossing) == pytest.approx(teacher.at(crossing), rel=1e-9)
        if abs(context - crossing) > 1e-6 * crossing:
            assert fewer == ((context > crossing) == ("beyond" in sentence))
    elif teacher != student:
        assert ("keeps fewer" in sentence) == (student.at(context) < teacher.at(context))


def test_gemma_card():
    # The teacher shares keys and values: 6,144 bytes a token; TICA with its own costs 7,168, sharing costs 3,072.
    teacher = CacheBytes(6144, 1000)
    assert break_even(teacher, CacheBytes(7168, 5000)) is None
    assert "more bytes than the teacher at every context" in compare(teacher, CacheBytes(7168, 5000))
    assert break_even(teacher, CacheBytes(3072, 1000 + 3072 * 40)) == 40
    assert "beyond 40 tokens" in compare(teacher, CacheBytes(3072, 1000 + 3072 * 40))
    assert "only below 2 tokens" in compare(teacher, CacheBytes(6644, 0))
    assert "exactly as many" in compare(teacher, teacher)


def test_a_missing_size_is_no_size():
    side = {"global_kv_bytes_per_token": 3, "recurrent_state_bytes": 5, "sliding_cache_bytes": 7}
    assert cache_bytes(side) == CacheBytes(3, 12)
    assert cache_bytes({**side, "recurrent_state_bytes": None}) is None
    assert cache_bytes({}) is None
