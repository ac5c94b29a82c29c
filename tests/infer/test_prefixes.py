"""Kept states: which one a prompt goes on from, where they are taken, what they hold, and that tokens stay the same."""

from functools import cache

import pytest
import torch

from small_student import make_student
from trihybrid.infer.engine import PAGE, Engine
from trihybrid.infer.prefixes import TOKEN_BYTES, Prefixes

MOST, CHUNK = 4, 8


@cache
def student() -> torch.nn.Module:
    return make_student()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


FIRST = prompt(30)
PARTING = FIRST[:27] + prompt(6, seed=1)
LONG = FIRST + prompt(40, seed=6)


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
    assert sorted(prefixes.marks(FIRST, 0)) == [8, 16, 29]
    answer = write(engine, FIRST, prefixes)
    assert (len(prefixes), answer) == (4, alone(tuple(FIRST)))
    whole = FIRST + answer
    # Behind the answer, behind the prompt, at borders; a state that has seen everything is no use.
    places = {33: [*whole, 3], 29: whole[:33], 16: PARTING, 8: FIRST[:16], 0: FIRST[:8]}
    assert {length: seen(prefixes, tokens) for length, tokens in places.items()} == {n: n for n in places}
    assert seen(prefixes, [5, *FIRST]) == 0


def test_where_prompts_part_a_state_is_kept_from_the_second_on(engine: Engine) -> None:
    """They share 27 tokens; 24 are whole chunks."""
    prefixes = Prefixes(engine, 2**20)
    write(engine, FIRST, prefixes)
    assert sorted(prefixes.marks(PARTING, 16)) == [24, 32]
    write(engine, PARTING, prefixes)
    assert seen(prefixes, [*FIRST[:27], 7, 8, 9]) == 24


@pytest.mark.parametrize("budget", [2**20, 12_000, 0])
def test_tokens_are_the_same_with_any_budget(engine: Engine, budget: int) -> None:
    """Among others that share a beginning; what is kept stays within the budget and goes back when it must leave."""
    prefixes = Prefixes(engine, budget)
    row = sum(part.numel() * part.element_size() for part in Engine(student())._states.read_row(0).values())
    page = PAGE * 2 * 8 * 4
    for tokens in (FIRST, PARTING, LONG, FIRST[:17], LONG, PARTING):
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
