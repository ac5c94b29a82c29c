"""Kept states: which one a prompt goes on from, where they are taken, what they hold, and that tokens stay the same."""

from functools import cache

import pytest
import torch

from small_student import make_student
from trihybrid.infer.engine import PAGE, Engine
from trihybrid.infer.prefixes import TOKEN_BYTES, Prefixes

MOST, CHUNK = 6, 16


@cache
def student() -> torch.nn.Module:
    return make_student()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


FIRST = prompt(70)
PARTING = FIRST[:50] + prompt(30, seed=1)


@cache
def alone(tokens: tuple[int, ...]) -> list[int]:
    """What follows, from an engine that keeps nothing and knows no marks."""
    return write(Engine(student(), chunk=CHUNK), list(tokens))


def write(engine: Engine, tokens: list[int], prefixes: Prefixes | None = None) -> list[int]:
    """What follows `tokens`; with prefixes as a server does it."""
    prefix, marks = None, ()
    if prefixes is not None:
        prefix = prefixes.longest(tokens)
        marks = prefixes.marks(tokens, len(prefix.tokens) if prefix else 0)
    sequence = engine.add(tokens, most=MOST, prefix=prefix, marks=marks)
    while engine.busy:
        engine.step()
    if prefixes is not None:
        for snapshot in (*engine.collect(sequence), engine.snapshot(sequence)):
            prefixes.keep(snapshot)
    new = engine.tokens_of(sequence)[len(tokens) :]
    engine.remove(sequence)
    return new


@pytest.fixture
def engine() -> Engine:
    return Engine(student(), rows=2, chunk=CHUNK)


def seen(prefixes: Prefixes, tokens: list[int]) -> int:
    snapshot = prefixes.longest(tokens)
    assert snapshot is None or list(snapshot.tokens) == tokens[: len(snapshot.tokens)]
    return 0 if snapshot is None else len(snapshot.tokens)


def test_the_longest_kept_beginning_is_found(engine: Engine) -> None:
    prefixes = Prefixes(engine, 2**20)
    assert sorted(prefixes.marks(FIRST, 0)) == [16, 32, 64, 69]
    answer = write(engine, FIRST, prefixes)
    assert (len(prefixes), answer) == (5, alone(tuple(FIRST)))
    whole = FIRST + answer
    # Behind the answer, behind the prompt, at borders; a state that has seen everything is no use.
    places = {75: [*whole, 3], 69: whole[:75], 64: FIRST[:69], 32: PARTING, 16: FIRST[:32], 0: FIRST[:16]}
    assert {length: seen(prefixes, tokens) for length, tokens in places.items()} == {n: n for n in places}
    assert seen(prefixes, [5, *FIRST]) == 0


def test_where_prompts_part_a_state_is_kept_from_the_second_on(engine: Engine) -> None:
    """They share 50 tokens; 48 are whole chunks."""
    prefixes = Prefixes(engine, 2**20)
    write(engine, FIRST, prefixes)
    assert sorted(prefixes.marks(PARTING, 32)) == [48, 64, 79]
    write(engine, PARTING, prefixes)
    assert seen(prefixes, [*FIRST[:50], 7, 8, 9]) == 48


@pytest.mark.parametrize("budget", [2**20, 40_000, 12_000, 0])
def test_tokens_are_the_same_with_any_budget(engine: Engine, budget: int) -> None:
    """Among others that share a beginning; what is kept stays within the budget and goes back when it must leave."""
    prefixes = Prefixes(engine, budget)
    row = sum(part.numel() * part.element_size() for part in Engine(student())._states.read_row(0).values())
    page = PAGE * 2 * 8 * 4
    for tokens in (FIRST, PARTING, FIRST, FIRST[:50] + prompt(9, seed=2), PARTING, FIRST[:33], PARTING):
        assert write(engine, tokens, prefixes) == alone(tuple(tokens))
        kept = list(prefixes._kept.values())
        pages = {number for snapshot in kept for number in snapshot.pages}
        count = sum(len(snapshot.tokens) for snapshot in kept)
        assert prefixes.bytes == len(kept) * row + len(pages) * page + count * TOKEN_BYTES <= budget
        assert engine.memory()["used"] == len(pages) * page
    assert (len(prefixes) > 0) == (budget > 0)
    while prefixes.evict():
        pass
    assert (engine.memory()["used"], prefixes.bytes) == (0, 0)
    assert not prefixes._lengths and not prefixes._borders


def test_what_was_used_longest_ago_leaves_first(engine: Engine) -> None:
    prefixes = Prefixes(engine, 2**20)
    short = [prompt(9, seed) for seed in (3, 4, 5)]
    for tokens in short:
        write(engine, tokens, prefixes)
    assert seen(prefixes, short[0]) == 8
    while len(prefixes) > 1:
        prefixes.evict()
    assert [seen(prefixes, tokens) for tokens in short] == [8, 0, 0]
